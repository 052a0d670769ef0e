"""Parts of the GPU check: the machine, bench.py, decode attention and an FP8 cache.

Each function runs in a process of its own. tiny: a rehearsal, on any device.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Result = dict[str, Any]


def machine(tiny: bool) -> Result:
    """The speed of the GPU, and the versions of everything."""
    import torch
    import transformers
    import triton

    from benchmarks.limit import probe

    device = device_name()
    measured = vars(probe(device, "bfloat16"))
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    bandwidth = measured["bandwidth"] / 1e12
    flops = measured["flops"] / 1e12
    return {
        "summary": f"{name}: {bandwidth:.2f} TB/s, {flops:.0f} TFLOP/s bf16",
        "device": name,
        **measured,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }


def device_name() -> str:
    """ "cuda", or "cpu" in a rehearsal without a GPU, which then runs kernels interpreted."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    return "cpu"


def bench(
    tiny: bool, shape: str, workload: str = "field", repeats: int = 1, **engine_args: Any
) -> Result:
    """The numbers of bench.py."""
    report = Path(tempfile.mkdtemp()) / "bench.json"
    if tiny:
        shape = "tiny"
        workload = "B"
    command = [sys.executable, "bench.py", "--roofline", "--workload", workload, "--shape", shape]
    command += ["--repeats", str(repeats), "--json", str(report)]
    for name, value in engine_args.items():
        command += ["--engine-arg", f"{name}={value}"]
    subprocess.run(command, cwd=ROOT, check=True)
    (result,) = json.loads(report.read_text())["results"]
    rate = result["output_tokens_per_second"]
    share = result["share_of_limit"]
    return {"summary": f"{rate:,.0f} tok/s, {share:.0%} of the limit", "speed": rate, **result}


def attention(tiny: bool) -> Result:
    """TB/s of K and V that decode attention reads."""
    device = device_name()
    import torch
    from gpu.attention_bandwidth import BATCHES, CONTEXTS, PAGES, copy_bandwidth, decode_bandwidth

    cases = [("auto", *case) for case in itertools.product(BATCHES, CONTEXTS, PAGES)]
    cases += [("fp8", *case) for case in itertools.product((8, 128), CONTEXTS, (16, 64))]
    shown = ("auto", 128, 1024, 64)
    total = 1 << 30
    if tiny:
        shown = ("auto", 2, 64, 64)
        cases = [shown]
        total = 1 << 20
    copy = copy_bandwidth(torch.device(device), total)
    rows = []
    rates = {}
    for case in cases:
        kind, batch, context, page = case
        measure = partial(decode_bandwidth, kv_cache_dtype=kind, device=device, total=total)
        rate = bandwidth_or_0(f"{case}", partial(measure, batch, context, page))
        rates[case] = rate
        rows.append(
            {
                "cache": kind,
                "batch": batch,
                "context": context,
                "page": page,
                "bytes_per_second": rate,
            }
        )
        sizes = f"{kind:4} {batch:4} x {context:5}, page {page:3}"
        print(f"{sizes}: {rate / 1e12:.2f} TB/s = {rate / copy:.0%}", flush=True)
    share = rates[shown] / copy
    _, batch, context, page = shown
    return {
        "summary": f"{batch} x {context}: {share:.0%} of the copy's {copy / 1e12:.2f} TB/s with "
        f"pages of {page}",
        "ok": all(rates.values()),
        "copy_bytes_per_second": copy,
        "rows": rows,
    }


def bandwidth_or_0(name: str, measure: Callable[[], float]) -> float:
    """Bytes a second. 0, and a line of output, where the launch fails."""
    try:
        return measure()
    except Exception as err:
        print(f"{name}: {err!r}", flush=True)
        return 0.0


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
    device = device_name()
    from gpu.attention_bandwidth import decode_bandwidth

    batch, context, total = (2, 64, 1 << 20) if tiny else (256, 700, 4 << 30)
    kinds = ("auto",) if device == "cpu" else ("auto", "fp8")
    rows = []
    for kind, shape in itertools.product(kinds, SHAPES):
        measure = partial(decode_bandwidth, kv_cache_dtype=kind, device=device, total=total)
        # Some shapes ask for more registers or memory than there are.
        rate = bandwidth_or_0(f"{kind} {shape}", partial(measure, batch, context, 64, shape=shape))
        rows.append({"cache": kind, "shape": shape, "bytes_per_second": rate})
        print(f"{kind:4} {rate / 1e12:.2f} TB/s with {shape or 'the shape of the table'}")
    texts = []
    for kind in kinds:
        chosen, *others = (row for row in rows if row["cache"] == kind)
        best = max(others, key=lambda row: row["bytes_per_second"])
        rates = [row["bytes_per_second"] / 1e12 for row in (chosen, best)]
        texts.append(f"{kind} {rates[0]:.2f} TB/s as chosen, {rates[1]:.2f} with {best['shape']}")
    ok = all(row["bytes_per_second"] for row in rows if not row["shape"])
    return {"summary": "; ".join(texts), "ok": ok, "rows": rows}


def make_llm(shape: str, **engine_args: Any) -> Any:
    """An LLM with random weights, in a shape of bench.py."""
    from benchmarks.workloads import write_shape
    from nanovllm import LLM

    folder = write_shape(shape, Path(tempfile.mkdtemp()))
    arguments = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 2048}
    return LLM(str(folder), **{**arguments, **engine_args})


def fp8_accuracy(tiny: bool) -> Result:
    """Logprobs of prompt tokens: the error of an FP8 cache, and the error of bfloat16 alone."""
    import torch

    from benchmarks.workloads import draw

    shape, size, vocabulary = ("tiny", 32, 512) if tiny else ("0.6b", 512, 10001)
    prompts = [[token % vocabulary for token in prompt] for prompt in draw(8, size, size)[0]]
    kinds: dict[str, dict[str, Any]] = {
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        "fp8": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    }
    if not torch.cuda.is_available():
        kinds["fp8"] = kinds["bfloat16"]  # a rehearsal
    scores = {}
    likeliest = {}
    for kind, engine_args in kinds.items():
        scores[kind], likeliest[kind] = prompt_scores(shape, prompts, **engine_args)
    result: Result = {}
    for kind in ("bfloat16", "fp8"):
        error = (scores[kind] - scores["float32"]).abs()
        same = [a == b for a, b in zip(likeliest[kind], likeliest["float32"])]
        result[kind] = {
            "mean": error.mean().item(),
            "worst": error.max().item(),
            "same_most_likely": sum(same) / len(same),
        }
    fp8, bf16 = result["fp8"], result["bfloat16"]
    result["summary"] = (
        f"mean error of a logprob {fp8['mean']:.4f} (bfloat16 alone {bf16['mean']:.4f}), same most "
        f"likely token {fp8['same_most_likely']:.1%} ({bf16['same_most_likely']:.1%})"
    )
    return result


def prompt_scores(shape: str, prompts: list[list[int]], **engine_args: Any) -> tuple[Any, Any]:
    """The logprob of each prompt token but the first ones, and the most likely token there."""
    import torch

    from nanovllm import SamplingParams

    llm = make_llm(shape, num_gpu_blocks_override=1024, enforce_eager=True, **engine_args)
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    scores = []
    likeliest = []
    for out in llm.generate(prompts, params, use_tqdm=False):
        for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:]):
            scores.append(entry[token].logprob)
            likeliest.append(max(entry, key=lambda token: entry[token].logprob))
    return torch.tensor(scores), likeliest
