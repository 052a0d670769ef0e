"""The commands of docs/learn.md run, and the answers that it gives are true.

The model is a tiny one, so numbers that the page gives by a formula are computed by the formula.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny import shared_model
from traced_run import data_of

from nanovllm.cli import main
from nanovllm.core.batch import ceil_div

PAGE = Path(__file__).parent.parent / "docs" / "learn.md"
SETUP, *COMMANDS = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
ANSWERS = re.search(r"^ANSWERS='(.*)'$", SETUP, re.MULTILINE)

Records = list[dict[str, Any]]
Trace = Callable[..., Records]


def arguments(command: str) -> list[str]:
    """What the shell passes to `nanovllm`."""
    assert ANSWERS is not None
    program, *given = shlex.split(command.replace("\\\n", ""))
    assert program == "nanovllm"
    values = {"$MODEL": shared_model()[0], "$ANSWERS": ANSWERS[1]}
    return [values.get(argument, argument) for argument in given]


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trace:
    """Runs the command that writes the page `name`, with changed options. Returns its records."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *changes: str) -> Records:
        (command,) = (each for each in COMMANDS if f"-o {name}.html" in each)
        main([*arguments(command), *changes])  # the last of two equal options counts
        (run,) = data_of((tmp_path / f"{name}.html").read_text("utf-8"))["runs"]
        return list(run["records"])

    return run


def steps(records: Records) -> Records:
    return [record for record in records if record["kind"] == "step"]


def prompts(records: Records) -> list[list[int]]:
    return [record["prompt"] for record in records if record["kind"] == "request"]


def answers(records: Records) -> dict[int, list[int]]:
    """Sequence -> its sampled tokens."""
    found: dict[int, list[int]] = {}
    for step in steps(records):
        for token in step["tokens"]:
            found.setdefault(token["seq"], []).append(token["id"])
    return found


def hits(records: Records) -> dict[int, int]:
    """Sequence -> tokens that came from the cache."""
    return {entry["seq"]: entry["cached"] for s in steps(records) for entry in s["admitted"]}


def test_every_command_has_a_test_here() -> None:
    names = [re.search(r"-o (\w+)\.html", command) for command in COMMANDS]
    tested = {name.removeprefix("test_exercise_") for name in globals()}
    assert {match[1] for match in names if match} <= tested
    assert len(COMMANDS) == len(re.findall(r"^## \d", PAGE.read_text(), re.MULTILINE))


@pytest.mark.parametrize("length", ["12", "24"])
def test_exercise_one(trace: Trace, length: str) -> None:
    first, *rest = steps(trace("one", "--max-tokens", length))
    assert len(rest) + 1 == int(length)
    assert [run["kind"] for run in first["seqs"]] == ["prefill"]
    assert all(step["budget"]["used"] == 1 for step in rest)


@pytest.mark.parametrize("size", [16, 32])
def test_exercise_blocks(trace: Trace, size: int) -> None:
    records = trace("blocks", "--block-size", str(size))
    (prompt,) = prompts(records)
    run, last = records[0], steps(records)[-1]
    assert run["num_blocks"] - last["free"] == ceil_div(len(prompt) + 39, size)


@pytest.mark.parametrize(("limit", "count"), [("2", 24), ("1", 48), ("3", 24), ("4", 12)])
def test_exercise_batching(trace: Trace, limit: str, count: int) -> None:
    found = steps(trace("batching", "--max-num-seqs", limit))
    assert len(found) == count
    assert max(len(step["running"]) for step in found) == int(limit)


@pytest.mark.parametrize("budget", [24, 48])
def test_exercise_chunks(trace: Trace, budget: int) -> None:
    records = trace("chunks", "--max-num-batched-tokens", str(budget))
    long = [
        (step["budget"]["used"], run)
        for step in steps(records)
        for run in step["seqs"]
        if run["seq"] == 1 and run["kind"] == "prefill"
    ]
    assert long[1][1]["count"] == budget - 1
    *earlier, last = long
    assert all(used == budget and not run["samples"] for used, run in earlier)
    assert last[1]["samples"]


def test_exercise_budget(trace: Trace) -> None:
    first = steps(trace("budget"))[0]
    assert [run["samples"] for run in first["seqs"]] == [True, True]


def test_exercise_prefix(trace: Trace) -> None:
    records = trace("prefix")
    one, two, _ = prompts(records)
    common = next(i for i, (a, b) in enumerate(zip(one, two)) if a != b)
    assert hits(records) == {0: 0, 1: common // 16 * 16, 2: 0}
    records = trace("prefix", "--no-enable-prefix-caching")
    assert set(hits(records).values()) == {0}
    assert {event["refs"] for step in steps(records) for event in step["blocks"]} <= {0, 1}


def test_exercise_preemption(trace: Trace) -> None:
    small = trace("preemption")
    at = next(i for i, step in enumerate(steps(small)) if step["preempted"])
    assert steps(small)[at]["preempted"][0] == steps(small)[at - 1]["running"][-1]
    blocks = sum(ceil_div(len(prompt) + 59, 16) for prompt in prompts(small))
    large = trace("preemption", "--num-gpu-blocks-override", str(blocks))
    assert not any(step["preempted"] for step in steps(large))
    assert answers(small) == answers(large)


def test_exercise_overlap(trace: Trace) -> None:
    overlapped = trace("overlap")
    assert answers(overlapped) == answers(trace("overlap", "--no-async-scheduling"))
    found = steps(overlapped)
    assert all(a["collect_time"] > b["time"] for a, b in pairwise(found))


def test_exercise_logprobs(trace: Trace) -> None:
    for step in steps(trace("logprobs")):
        for token in step["tokens"]:
            assert len(token["top"]) == 3
            assert token["logprob"] == max(logprob for _, logprob in token["top"])
