"""The page of a recorded run as a file: what it holds, and what it must not hold.

tests/test_trace_browser.py opens it in a browser.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from traced_run import HOSTILE, data_of, traced_records, unpacked

from nanovllm.trace.page import SCRIPTS, WEB, Run, packed, read_records, write_page, write_runs
from nanovllm.trace.terms import PACKAGE, TERMS


class Elements(HTMLParser):
    """All elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "run.html"
    write_page(traced_records(), path)
    return path.read_text("utf-8")


def test_the_page_holds_exactly_the_records(page: str) -> None:
    (run,) = data_of(page)["runs"]
    assert run["records"] == traced_records()


def test_json_lines_become_a_page_later(tmp_path: Path) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in traced_records())
    (tmp_path / "run.jsonl").write_text(lines, "utf-8")
    assert read_records(tmp_path / "run.jsonl") == traced_records()


def test_the_page_needs_no_network(page: str) -> None:
    parsed = Elements(page)
    loads = [(tag, a) for tag, a in parsed.elements if {"src", "href", "srcset"} & set(a)]
    assert loads == []
    assert "url(" not in page
    assert "@import" not in page
    policies = [a["content"] for _, a in parsed.elements if "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    allowed = "http://www.w3.org/2000/svg"  # a name, not an address
    scripts = "".join((WEB / name).read_text("utf-8") for name in SCRIPTS)
    assert set(re.findall(r"https?://[^\"'\s]+", scripts)) == {allowed}


def test_text_of_a_prompt_cannot_become_html(page: str) -> None:
    tags = [tag for tag, _ in Elements(page).elements]
    assert tags.count("script") == 1 + len(SCRIPTS)
    assert "img" not in tags
    assert HOSTILE not in page


@pytest.mark.parametrize(
    "text", [HOSTILE, "<!--<script>", "]]>", "\ud83d", "\u2028\u2029", "{{data}}"]
)
def test_any_text_survives_the_way_into_a_script(text: str) -> None:
    written = packed({"text": text})
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", written)
    assert unpacked(written) == {"text": text}


def test_placeholders_in_a_prompt_are_text(tmp_path: Path) -> None:
    records = [{"kind": "run", "model": "{{style}} {{scripts}}"}]
    write_page(records, tmp_path / "run.html")
    (run,) = data_of((tmp_path / "run.html").read_text("utf-8"))["runs"]
    assert run["records"] == records


def test_a_page_is_small(page: str) -> None:
    assert len(page.encode()) < 150_000
    assert len(packed(traced_records())) < len(json.dumps(traced_records())) / 3


def test_several_runs_have_names_notes_and_stops(tmp_path: Path) -> None:
    runs = [Run(traced_records(), "One", "A note.", ["start"]), Run([], "Two")]
    write_runs(runs, tmp_path / "runs.html")
    found = data_of((tmp_path / "runs.html").read_text("utf-8"))["runs"]
    assert [(run["name"], run["note"], run["stops"]) for run in found] == [
        ("One", "A note.", ["start"]),
        ("Two", "", None),
    ]


def test_a_page_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_runs([], tmp_path / "runs.html")


# -- terms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.key)
def test_a_term_is_one_sentence_and_links_to_a_line_that_exists(term: Any) -> None:
    assert re.fullmatch(r"[A-Z][^.]*\.", term.sentence)
    path, line = term.place()
    text = (PACKAGE.parent / path).read_text().splitlines()[line - 1].strip()
    start = term.snippet or ("def ", "class ", "@")
    assert text.startswith(start)


def test_links_begin_with_the_given_base(tmp_path: Path) -> None:
    write_page(
        traced_records(), tmp_path / "run.html", source_base="https://example.org/blob/main/"
    )
    terms = data_of((tmp_path / "run.html").read_text("utf-8"))["terms"]
    entry = next(term for term in terms if term["key"] == "preemption")
    assert re.fullmatch(r"nanovllm/engine/scheduler\.py:\d+", entry["place"])
    place = entry["place"].replace(":", "#L")
    assert entry["link"] == f"https://example.org/blob/main/{place}"


def test_every_word_that_the_page_explains_is_a_term() -> None:
    used = set(re.findall(r'data-term="(\w+)"', (WEB / "page.html").read_text("utf-8")))
    for name in SCRIPTS:
        script = (WEB / name).read_text("utf-8")
        used |= set(re.findall(r'\bterm\("(\w+)"', script))
        used |= set(re.findall(r"\[\[(\w+)\|", script))
    assert used <= {term.key for term in TERMS}
    assert len(used) > 20
