"""One recorded run of a tiny model for the tests of its page, and what its records say.

The run has chunks, decodes beside prefills, waiting sequences, prefix hits, shared blocks, evictions
and preemptions. The functions read the records without the code of the page.
"""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64decode
from functools import cache
from typing import Any

from tiny import make_llm, session_folder

from nanovllm import SamplingParams

NUM_BLOCKS = 14
BLOCK_SIZE = 16
STORY = "the dog is in the house and the cat is on the mat "
# Text that would end a script, open a comment or load an image if the page read it as HTML.
HOSTILE = (
    '</script><img src="https://example.org/x.png" onerror="window.hurt = 1"><!-- & \u2028 é ☃'
)
PROMPTS = [STORY + "then", "once", STORY + "now", HOSTILE, STORY + "who", "the end"]


def data_of(page: str) -> Any:
    """What the scripts of a page read."""
    found = re.search(r'id="data">([^<]*)</script>', page)
    assert found is not None
    return unpacked(found[1])


def unpacked(text: str) -> Any:
    return json.loads(gzip.decompress(b64decode(text)))


@cache
def traced_records() -> list[dict[str, Any]]:
    path = session_folder() / "run.jsonl"
    llm = make_llm(
        trace=str(path),
        num_gpu_blocks_override=NUM_BLOCKS,
        max_model_len=160,
        max_num_batched_tokens=32,
        max_num_seqs=4,
        seed=1,
    )
    params = [
        SamplingParams(temperature=1, max_tokens=16 + 4 * i, ignore_eos=True, logprobs=2)
        for i in range(len(PROMPTS))
    ]
    llm.generate(PROMPTS, params, use_tqdm=False)
    with path.open(encoding="utf-8") as lines:  # str.splitlines would also split at U+2028
        return [json.loads(line) for line in lines]


def frames(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page shows one after the other: steps, and the ends after them."""
    return [record for record in records if record["kind"] in ("step", "end")]


def block_kinds(records: list[dict[str, Any]]) -> list[dict[int, tuple[int, bool]]]:
    """Of each frame: block -> (reference count, whether a prompt can hit it)."""
    state: dict[int, tuple[int, bool]] = {}
    found = []
    for frame in frames(records):
        for event in frame["blocks"]:
            registered = state.get(event["block"], (0, False))[1]
            if event["event"] in ("register", "evict", "allocate"):
                registered = event["event"] == "register"
            state[event["block"]] = (event["refs"], registered)
        found.append(dict(state))
    return found


def block_tables(records: list[dict[str, Any]]) -> list[dict[int, list[int]]]:
    """Of each frame: sequence -> its blocks."""
    tables: dict[int, list[int]] = {}
    found = []
    for frame in frames(records):
        for seq in [*frame["preempted"], *(entry["seq"] for entry in frame["finished"])]:
            tables.pop(seq, None)
        tables.update({int(seq): table for seq, table in frame["tables"].items()})
        found.append(dict(tables))
    return found


def texts(records: list[dict[str, Any]]) -> list[dict[int, str]]:
    """Of each frame: sequence -> its generated text."""
    text = {seq: "" for record in records if record["kind"] == "request" for seq in record["seqs"]}
    found = []
    for frame in frames(records):
        for entry in frame["finished"]:
            text[entry["seq"]] += entry.get("text", "")
        for token in frame.get("tokens", []):
            text[token["seq"]] += token["text"]
        found.append(dict(text))
    return found


def pieces(records: list[dict[str, Any]], seq: int) -> list[str]:
    """The text of every token of a sequence, alone, prompt first."""
    found: list[str] = []
    for record in records:
        if record["kind"] == "request" and seq in record["seqs"]:
            found += record["prompt_pieces"]
        for token in record.get("tokens", []):
            if token["seq"] == seq:
                found.append(token.get("piece", token["text"]))
    return found
