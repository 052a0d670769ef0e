"""Everything that only a GPU can tell, in one command below ten minutes.

    python tests/gpu/check.py --out DIR [--parts engine-tests,bench-0.6b,...] [--minutes 9.5]

Each part runs in a process of its own with a time limit, so a part that fails, hangs or kills
its process costs no other. Parts come in the order of what should be known first. Parts for
which no time is left are left out, and a second call with --parts runs them. A part that turns
something off is compared with its baseline if both run in one call.

It needs torch, transformers, pytest and hypothesis, and no network: models are random weights
in the shapes of Qwen3. Writes DIR/check.json, DIR/check.md (the table that it prints) and
DIR/log.txt (all output).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpu import parts, pytest_runs, traces  # noqa: E402

MARK = "RESULT "  # begins the line of a part's output that holds its result
SHORTEST = 15  # seconds: no part ends in less
Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """limit: seconds. run: (tiny=...) -> result. baseline: the part with the same speed unit."""

    limit: int
    run: Callable[..., Result]
    baseline: str = ""


def operations(*changes: str) -> dict[str, Any]:
    """The engine argument that turns hand-written kernels on ("+name") or off ("-name")."""
    return {"compilation_config": {"custom_ops": list(changes)}}


def kernels(tiny: bool) -> Result:
    from gpu import kernel_times  # imports torch

    return kernel_times.kernels(tiny)


def products(tiny: bool) -> Result:
    from gpu import kernel_times

    return kernel_times.products(tiny)


small = partial(parts.bench, shape="0.6b")
large = partial(parts.bench, shape="8b")
# A quarter of the requests fits. So nearly every step holds a prompt.
mixed = partial(small, max_num_seqs=64)
no_pieces = {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}
filters = {"top_p": 0.95, "top_k": 20}
few_rows = operations("+few_rows_linear", "+swiglu_linear")

PARTS: dict[str, Part] = {
    "machine": Part(60, parts.machine),
    "attention": Part(120, parts.attention),
    "trace": Part(90, traces.trace),
    "bench-0.6b": Part(120, small),
    "kernel-tests": Part(150, pytest_runs.kernel_tests),
    "engine-tests": Part(400, pytest_runs.engine_tests),
    "memory-tests": Part(150, pytest_runs.memory_tests),
    "kernels": Part(120, kernels),
    "products": Part(90, products),
    "bench-8b": Part(150, large),
    "filters": Part(90, partial(traces.trace, **filters), "trace"),
    "pdl-on": Part(90, partial(small, **operations("+pdl")), "bench-0.6b"),
    "few-rows-on": Part(90, partial(small, **few_rows), "bench-0.6b"),
    "compile-off": Part(90, partial(small, compilation_config=0), "bench-0.6b"),
    "mixed": Part(90, mixed),
    "pieces-off": Part(90, partial(mixed, **no_pieces), "mixed"),
    "decode-shapes": Part(100, parts.decode_shapes),
    "graphs-off": Part(90, partial(small, enforce_eager=True), "bench-0.6b"),
    "overlap-off": Part(60, partial(small, async_scheduling=False), "bench-0.6b"),
    "fp8-cache": Part(60, partial(small, kv_cache_dtype="fp8"), "bench-0.6b"),
    "page-16": Part(60, partial(small, block_size=16), "bench-0.6b"),
    "page-256": Part(60, partial(small, block_size=256), "bench-0.6b"),
    "trace-1": Part(60, partial(traces.trace, count=1)),
    "filters-1": Part(60, partial(traces.trace, count=1, **filters), "trace-1"),
    "one-sequence": Part(60, partial(small, workload="B")),
    "fp8-accuracy": Part(60, parts.fp8_accuracy),
    "8b-few-rows-on": Part(90, partial(large, **few_rows), "bench-8b"),
    "8b-fp8-cache": Part(90, partial(large, kv_cache_dtype="fp8"), "bench-8b"),
}


def run(name: str, seconds: float, tiny: bool, log: TextIO) -> Result:
    """Runs one part in a process of its own. Returns its result, or how it failed."""
    command = [sys.executable, __file__, "--part", name]
    if tiny:
        command.append("--tiny")
    log.write(f"\n===== {name}\n")
    log.flush()
    begin = log.tell()
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        how = f"ended with status {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        how = f"did not end within {seconds:.0f} s"
        end(process)
    log.seek(begin)
    lines = log.read().splitlines()
    log.seek(0, os.SEEK_END)
    found = [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)]
    result = found[-1] if found else unfinished(how, lines)
    result["ok"] = bool(result.get("ok", True))
    result["seconds"] = time.monotonic() - start
    return result


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and its processes. bench.py ends its engines, which are in other sessions."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def unfinished(how: str, lines: list[str]) -> Result:
    """The result of a part that gave none: the tests that had run, else its last line."""
    outcomes = pytest_runs.Outcomes.read(lines)
    if outcomes.count:
        return {**outcomes.result(), "ok": False, "summary": f"{how}: {outcomes.summary()}"}
    last = next((line for line in reversed(lines) if line.strip()), "")
    return {"ok": False, "summary": f"{how}: {last[:200]}"}


def compare(part: Part, result: Result, results: dict[str, Result]) -> None:
    """Adds the ratio of the result's speed to that of the part's baseline."""
    baseline = results.get(part.baseline, {})
    if "speed" in result and "speed" in baseline:
        result["ratio"] = result["speed"] / baseline["speed"]
        result["summary"] += f"; {result['ratio']:.3f} of the speed of {part.baseline}"


def run_all(names: list[str], deadline: float, tiny: bool, folder: Path) -> dict[str, Result]:
    results: dict[str, Result] = {}
    with open(folder / "log.txt", "w+") as log:
        for name in names:
            part = PARTS[name]
            left = deadline - time.monotonic()
            if left < SHORTEST:
                result = {"ok": False, "summary": "left out: no time", "seconds": 0.0}
            else:
                result = run(name, min(part.limit, left), tiny, log)
                compare(part, result, results)
            results[name] = result
            failed = "" if result["ok"] else "FAILED, "
            print(f"{name}: {failed}{result['summary']} [{result['seconds']:.0f} s]", flush=True)
            (folder / "check.json").write_text(json.dumps(results, indent=1))
            (folder / "check.md").write_text(table(results))
    return results


def table(results: dict[str, Result]) -> str:
    rows = ["| part | | |", "| --- | --- | --- |"]
    for name, result in results.items():
        rows.append(f"| {name} | {'ok' if result['ok'] else 'FAILED'} | {result['summary']} |")
    return "\n".join(rows) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="folder for the results")
    add(
        "--parts",
        type=lambda text: text.split(","),
        default=list(PARTS),
        help=f"of {', '.join(PARTS)}; default all",
    )
    add("--minutes", type=float, default=9.5, help="parts that do not fit any more are left out")
    add("--tiny", action="store_true", help="a rehearsal: tiny shapes, and any device")
    add("--part", help=argparse.SUPPRESS)  # what the processes of parts are told
    options = parser.parse_args()
    if options.part:
        return options
    if options.out is None:
        parser.error("--out is needed: the folder for the results")
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"--parts {','.join(unknown)} is not known; accepted are {', '.join(PARTS)}")
    return options


def main() -> int:
    options = parse()
    if options.part:
        result = PARTS[options.part].run(tiny=options.tiny)
        print(MARK + json.dumps(result))
        return 0
    import torch

    if not torch.cuda.is_available() and not options.tiny:
        reason = f"torch {torch.__version__} finds no CUDA device"
        print(f"check.py needs a GPU: {reason}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    results = run_all(options.parts, deadline, options.tiny, options.out)
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
