"""Writes recorded runs as one HTML file that needs no network and no server.

web/page.html is the frame. The style and the scripts are copied into it, with the records and
the terms as compressed JSON. The scripts read the JSON and draw.
"""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanovllm.trace.terms import PACKAGE, TERMS, Term

WEB = Path(__file__).parent / "web"
SCRIPTS = (  # in the order in which the page runs them
    "state.js",
    "tour.js",
    "elements.js",
    "chart.js",
    "step.js",
    "blocks.js",
    "sequences.js",
    "words.js",
    "page.js",
)
Record = Mapping[str, object]


@dataclass(frozen=True)
class Run:
    """A recorded run under a name.

    `stops` are the keys of tour.js that its guided tour shows. None shows every stop that the
    records have an example of.
    """

    records: Sequence[Record]
    name: str = "Run"
    note: str = ""
    stops: Sequence[str] | None = None


def read_records(path: str | Path) -> list[Record]:
    """The records of a file of JSON lines, which `LLM(trace="run.jsonl")` writes."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_page(
    records: Sequence[Record], path: str | Path, *, source_base: str | None = None
) -> None:
    """Writes one run as a page. `source_base`: as for `write_runs`."""
    write_runs([Run(records)], path, source_base=source_base)


def write_runs(runs: Sequence[Run], path: str | Path, *, source_base: str | None = None) -> None:
    """Writes runs as one page, on which a reader chooses among them.

    source_base: the URL of the folder that holds `nanovllm/`, for the links to lines of code. The
    default is the installed package as a file:// URL. Raises ValueError if there is no run.
    """
    if not runs:
        raise ValueError("runs=[]: a page needs at least one run")
    if source_base is None:
        source_base = PACKAGE.parent.as_uri()
    data = {
        "runs": [
            {"name": run.name, "note": run.note, "stops": run.stops, "records": run.records}
            for run in runs
        ],
        "terms": [term_entry(term, source_base.rstrip("/")) for term in TERMS],
    }
    scripts = [f"<script>\n{(WEB / name).read_text('utf-8')}</script>" for name in SCRIPTS]
    parts = {
        "style": (WEB / "page.css").read_text("utf-8"),
        "data": packed(data),
        "scripts": "\n".join(scripts),
    }
    template = (WEB / "page.html").read_text("utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    Path(path).write_text(page, "utf-8")


def term_entry(term: Term, source_base: str) -> dict[str, str]:
    """A term as the page reads it."""
    path, line = term.place()
    return {
        "key": term.key,
        "name": term.name,
        "sentence": term.sentence,
        "place": f"{path}:{line}",
        "link": f"{source_base}/{path}#L{line}",
    }


def packed(data: object) -> str:
    """JSON, compressed by gzip, in base64.

    A long run is megabytes of JSON that repeats itself. No text of a run can end the element
    that holds the result.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return b64encode(gzip.compress(text.encode(), mtime=0)).decode()
