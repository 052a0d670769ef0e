"""Everything that only a GPU can tell, in one command below ten minutes.

    python tests/gpu/check.py --out DIR [--parts engine-tests,bench-0.6b,...] [--minutes 9.5]

Each part runs in a process of its own with a time limit, so a part that fails, hangs or kills its process costs no other. It
needs torch, transformers, pytest and hypothesis, and no network: models are random weights in Qwen3's shapes.
Writes DIR/check.json, DIR/check.md (the table that it prints) and DIR/log.txt (all output).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MARK = "RESULT "  # begins the line of a part's output that holds its result
Result = dict[str, Any]

# -- parts ---------------------------------------------------------------------------------------------------------------


def machine(tiny: bool) -> Result:
    import torch
    import transformers
    import triton

    from benchmarks.limit import probe

    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    versions |= {"triton": triton.__version__, "transformers": transformers.__version__}
    measured = vars(probe(device, "bfloat16"))
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    text = f"{name}: {measured['bandwidth'] / 1e12:.2f} TB/s, {measured['flops'] / 1e12:.0f} TFLOP/s bf16"
    return {"summary": text, "device": name, **measured, **versions}


def tests_of(*arguments: str, tiny: bool) -> Result:
    """The tests with the mark "gpu".

    Tests of memory run alone on the GPU. Tests of kernels mostly compile, so they run in parallel.
    """
    report = Path(tempfile.mkdtemp()) / "junit.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-m",
        "gpu",
        "--durations=10",
        f"--junitxml={report}",
    ]
    if arguments[0] != "tests/gpu" and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    done = subprocess.run([*command, "-p", "no:cacheprovider", *arguments], cwd=ROOT)
    import xml.etree.ElementTree as ElementTree

    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    text = f"{counts['passed']} passed, {counts['failures'] + counts['errors']} failed, {counts['skipped']} skipped"
    return {
        "summary": text,
        "ok": done.returncode == 0 and counts["passed"] > 0,
        **counts,
        "failed": failed,
    }


def bench(
    tiny: bool, shape: str, workload: str = "field", repeats: int = 1, **engine_args: Any
) -> Result:
    """The numbers of bench.py."""
    report = Path(tempfile.mkdtemp()) / "bench.json"
    if tiny:
        shape, workload = "tiny", "B"
    command = [sys.executable, "bench.py", "--roofline", "--workload", workload, "--shape", shape]
    command += ["--repeats", str(repeats), "--json", str(report)]
    for name, value in engine_args.items():
        command += ["--engine-arg", f"{name}={value}"]
    subprocess.run(command, cwd=ROOT, check=True)
    (result,) = json.loads(report.read_text())["results"]
    rate, share = result["output_tokens_per_second"], result["share_of_limit"]
    return {"summary": f"{rate:,.0f} tok/s, {share:.0%} of the limit", **result}


def attention(tiny: bool) -> Result:
    """TB/s of K and V that decode attention reads."""
    import torch
    from gpu.attention_bandwidth import BATCHES, CONTEXTS, PAGES, copy_bandwidth, decode_bandwidth

    copy = copy_bandwidth(torch.device("cuda"))
    cases = [("auto", *case) for case in itertools.product(BATCHES, CONTEXTS, PAGES)]
    cases += [("fp8", *case) for case in itertools.product((8, 128), CONTEXTS, (16, 64))]
    rows = []
    for kind, batch, context, page in cases:
        try:
            rate = decode_bandwidth(batch, context, page, kv_cache_dtype=kind)
        except Exception as err:
            print(f"{kind} {batch} {context} {page}: {err!r}", flush=True)
            rate = 0.0
        rows.append(
            {
                "cache": kind,
                "batch": batch,
                "context": context,
                "page": page,
                "bytes_per_second": rate,
            }
        )
        print(
            f"{kind:4} {batch:4} x {context:5}, page {page:3}: {rate / 1e12:.2f} TB/s = {rate / copy:.0%}",
            flush=True,
        )
    of = {(r["cache"], r["batch"], r["context"], r["page"]): r["bytes_per_second"] for r in rows}
    text = f"128 x 1024: {of['auto', 128, 1024, 64] / copy:.0%} of the copy's {copy / 1e12:.2f} TB/s with pages of 64"
    return {"summary": text, "ok": all(of.values()), "copy_bytes_per_second": copy, "rows": rows}


SHAPES: list[dict[str, int]] = [
    {},
    {"num_stages": 2},
    {"num_stages": 4},
    {"maxnreg": 128},
    {"maxnreg": 240},
    {"TILE": 32},
    {"TILE": 128, "maxnreg": 240},
    {"num_warps": 8, "maxnreg": 128},
]


def decode_shapes(tiny: bool) -> Result:
    """Whether other tiles, pipelines, warps or registers would read K and V faster."""
    from gpu.attention_bandwidth import decode_bandwidth

    rows = []
    for kind, shape in itertools.product(("auto", "fp8"), SHAPES):
        try:
            rate = decode_bandwidth(256, 700, 64, kv_cache_dtype=kind, shape=shape, total=4 << 30)
        except Exception as err:  # more registers or shared memory than there are
            print(f"{kind} {shape}: {err!r}", flush=True)
            rate = 0.0
        rows.append({"cache": kind, "shape": shape, "bytes_per_second": rate})
        print(f"{kind:4} {rate / 1e12:.2f} TB/s with {shape or 'what is chosen'}", flush=True)
    texts = []
    for kind in ("auto", "fp8"):
        chosen, *others = (row for row in rows if row["cache"] == kind)
        best = max(others, key=lambda row: row["bytes_per_second"])
        rates = [row["bytes_per_second"] / 1e12 for row in (chosen, best)]
        texts.append(f"{kind} {rates[0]:.2f} TB/s as chosen, {rates[1]:.2f} with {best['shape']}")
    return {
        "summary": "; ".join(texts),
        "ok": all(r["bytes_per_second"] for r in rows if not r["shape"]),
        "rows": rows,
    }


def make_llm(shape: str, **engine_args: Any) -> Any:
    from benchmarks.workloads import write_shape
    from nanovllm import LLM

    folder = write_shape(shape, Path(tempfile.mkdtemp()))
    return LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        **{"max_model_len": 2048, **engine_args},
    )


def trace(tiny: bool, count: int = 256) -> Result:
    """Steady decoding of `count` sequences: the host's time, calls that wait, the device's use."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from benchmarks.workloads import draw
    from nanovllm import SamplingParams
    from nanovllm.runner.model_runner import PendingStep

    llm = make_llm("tiny" if tiny else "0.6b", async_scheduling=True)
    engine, steps = llm.llm_engine, 40
    prompts, _ = draw(count, 100, 900 if not tiny else 120)
    for i, prompt in enumerate(prompts):
        ids = [token % engine.vocab_size for token in prompt]
        engine.add_request(
            str(i), ids, SamplingParams(temperature=0.6, max_tokens=200, ignore_eos=True)
        )
    while engine.scheduler.waiting or len(engine.scheduler.running) < count:
        engine.step()
    for _ in range(20):
        engine.step()

    waited, collect = [0.0], PendingStep.collect

    def timed(self: PendingStep) -> Any:
        start = time.perf_counter()
        try:
            return collect(self)
        finally:
            waited[-1] += time.perf_counter() - start

    PendingStep.collect = timed  # type: ignore[method-assign]
    times = [time.perf_counter()]
    for _ in range(steps):
        engine.step()
        times.append(time.perf_counter())
        waited.append(0.0)
    PendingStep.collect = collect  # type: ignore[method-assign]
    step = [b - a for a, b in itertools.pairwise(times)]
    host = [1e6 * (s - w) for s, w in zip(step, waited)]
    result: Result = {
        "step_us": 1e6 * statistics.median(step),
        "host_us": statistics.median(host),
        "host_us_worst": max(host),
        "graphs": engine.executor.runner.graphs is not None,
    }
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as prof:
        for _ in range(steps):
            with record_function(STEP):
                engine.step()
    path = Path(tempfile.mkdtemp()) / "trace.json"
    prof.export_chrome_trace(str(path))
    result |= read_trace(json.loads(path.read_text())["traceEvents"], steps)
    llm.llm_engine.abort_request([str(i) for i in range(count)])
    unwanted = {name: n for name, n in result["waits"].items() if name != "cudaEventSynchronize"}
    result["ok"] = (
        result["graphs"]
        and not unwanted
        and result["waits"].get("cudaEventSynchronize", 0) <= steps + 1
    )
    result["summary"] = (
        f"{count} sequences: {result['step_us']:.0f} us a step, host {result['host_us']:.0f} us of it, device busy "
        f"{result['busy']:.1%}, waits beside collect: {unwanted or 'none'}"
    )
    return result


STEP = "nanovllm step"
WAITS = (
    "Synchronize",
    "cudaMalloc",
    "cudaFree",
    "cudaHostAlloc",
    "cudaMemcpy",
    "cuMemAlloc",
    "cuMemcpy",
)
WAITING_OPERATIONS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
)


def read_trace(events: list[dict[str, Any]], steps: int) -> Result:
    """Reads a profiler's trace: calls that may wait for the device, and the device's use of time."""
    waiting: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    intervals = []
    ranges = [
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("name") == STEP and e.get("cat") == "user_annotation"
    ]
    for event in events:
        name, category = event.get("name", ""), event.get("cat", "")
        is_call = category in ("cuda_runtime", "cuda_driver") and any(
            part in name for part in WAITS
        )
        if (
            is_call and not name.startswith(("cudaMemcpyAsync", "cuMemcpyAsync"))
        ) or name in WAITING_OPERATIONS:
            waiting[name] += any(
                start <= event["ts"] < stop for start, stop in ranges
            )  # the profiler's own come after
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            intervals.append((event["ts"], event["ts"] + event["dur"]))
            kernels[name[:80]] += event["dur"]
    busy, end = 0.0, 0.0
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span = end - min(intervals)[0] if intervals else 1.0
    top = {name: duration / steps for name, duration in kernels.most_common(25)}
    return {
        "waits": {name: n for name, n in waiting.items() if n},
        "busy": busy / span,
        "launches_a_step": len(intervals) / steps,
        "kernels_us": top,
    }


def fp8_accuracy(tiny: bool) -> Result:
    """Logprobs of prompt tokens: the error of an FP8 cache, and the error of bfloat16 alone."""
    import torch

    from benchmarks.workloads import draw
    from nanovllm import SamplingParams

    shape, size = ("tiny", 32) if tiny else ("0.6b", 512)
    vocabulary = 512 if tiny else 10001
    prompts = [[token % vocabulary for token in prompt] for prompt in draw(8, size, size)[0]]
    kinds: dict[str, dict[str, Any]] = {
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        "fp8": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    }
    scores, best = {}, {}
    for kind, engine_args in kinds.items():
        llm = make_llm(shape, num_gpu_blocks_override=1024, enforce_eager=True, **engine_args)
        outs = llm.generate(
            prompts, SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False
        )
        entries = [
            (t, e)
            for out in outs
            for t, e in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])
        ]
        scores[kind] = torch.tensor([entry[token].logprob for token, entry in entries])
        best[kind] = [max(entry, key=lambda token: entry[token].logprob) for _, entry in entries]
        del llm
    result: Result = {}
    for kind in ("bfloat16", "fp8"):
        error = (scores[kind] - scores["float32"]).abs()
        agree = sum(a == b for a, b in zip(best[kind], best["float32"])) / len(best[kind])
        result[kind] = {
            "mean": error.mean().item(),
            "worst": error.max().item(),
            "same_most_likely": agree,
        }
    text = "mean error of a logprob {:.4f} (bfloat16 alone {:.4f}), same most likely token {:.1%} ({:.1%})"
    values = [
        result[kind][key] for key in ("mean", "same_most_likely") for kind in ("fp8", "bfloat16")
    ]
    return {"summary": text.format(*values), **result}


# In order of what should be known first when time runs out; seconds at most.
PARTS: dict[str, tuple[int, Callable[..., Result]]] = {
    "machine": (60, machine),
    "engine-tests": (200, partial(tests_of, "tests/gpu")),
    "bench-0.6b": (120, partial(bench, shape="0.6b", repeats=3)),
    "trace": (90, trace),
    "attention": (120, attention),
    "decode-shapes": (100, decode_shapes),
    "kernel-tests": (150, partial(tests_of, "tests", "--ignore=tests/gpu")),
    "bench-8b": (150, partial(bench, shape="8b")),
    "graphs-off": (90, partial(bench, shape="0.6b", enforce_eager=True)),
    "overlap-off": (60, partial(bench, shape="0.6b", async_scheduling=False)),
    "fp8-cache": (60, partial(bench, shape="0.6b", kv_cache_dtype="fp8")),
    "page-16": (60, partial(bench, shape="0.6b", block_size=16)),
    "page-256": (60, partial(bench, shape="0.6b", block_size=256)),
    "trace-1": (60, partial(trace, count=1)),
    "one-sequence": (60, partial(bench, shape="0.6b", workload="B")),
    "fp8-accuracy": (60, fp8_accuracy),
    "8b-fp8-cache": (90, partial(bench, shape="8b", kv_cache_dtype="fp8")),
}

# -- running them --------------------------------------------------------------------------------------------------------


def run(name: str, seconds: float, tiny: bool, log: Any) -> Result:
    """Runs one part in a process of its own. Returns its result, or how it failed."""
    command = [sys.executable, __file__, "--part", name, *(["--tiny"] if tiny else [])]
    log.write(f"\n===== {name}\n")
    log.flush()
    start, begin = time.monotonic(), log.tell()
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )  # fmt: skip
    try:
        code: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
        os.killpg(
            process.pid, signal.SIGINT
        )  # bench.py ends its engines, which are in sessions of their own
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log.seek(begin)
    lines = log.read().splitlines()
    log.seek(0, os.SEEK_END)
    found = [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)]
    result = found[-1] if found else {"ok": False}
    if not found:
        how = f"did not end within {seconds:.0f} s" if code is None else f"ended with status {code}"
        last = next((line for line in reversed(lines) if line.strip()), "")
        result["summary"] = f"{how}: {last[:200]}"
    return {**result, "ok": bool(result.get("ok", True)), "seconds": time.monotonic() - start}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), help=f"of {', '.join(PARTS)}; default all"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="parts that do not fit any more are left out"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a rehearsal: tiny shapes, and any device"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what the processes of parts are told
    options = parser.parse_args()
    if options.part:
        print(MARK + json.dumps(PARTS[options.part][1](tiny=options.tiny)))
        return 0
    if options.out is None:
        parser.error("--out is needed: the folder for the results")
    if unknown := sorted(set(options.parts or ()) - set(PARTS)):
        parser.error(f"--parts {','.join(unknown)} is not known; accepted are {', '.join(PARTS)}")
    import torch

    if not torch.cuda.is_available() and not options.tiny:
        print(
            f"check.py needs a GPU: torch {torch.__version__} finds no CUDA device", file=sys.stderr
        )
        return 2

    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    results: dict[str, Result] = {}
    with open(options.out / "log.txt", "w+") as log:
        for name in options.parts or PARTS:
            left = deadline - time.monotonic()
            if left < 15:
                results[name] = {"ok": False, "summary": "left out: no time", "seconds": 0.0}
            else:
                results[name] = run(name, min(PARTS[name][0], left), options.tiny, log)
            result = results[name]
            print(
                f"{name}: {'' if result['ok'] else 'FAILED, '}{result['summary']} [{result['seconds']:.0f} s]",
                flush=True,
            )
            (options.out / "check.json").write_text(json.dumps(results, indent=1))
    rows = [
        f"| {name} | {'ok' if r['ok'] else 'FAILED'} | {r['summary']} |"
        for name, r in results.items()
    ]
    (options.out / "check.md").write_text(
        "\n".join(["| part | | |", "| --- | --- | --- |", *rows]) + "\n"
    )
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
