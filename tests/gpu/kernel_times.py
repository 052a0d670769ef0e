"""Parts of the GPU check: hand-written kernels beside the compiled definition, and products.

Times are of many calls in one CUDA graph, as in a decode step, with the gaps between
kernels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu.parts import device_name
from torch import Tensor

Work = Callable[[], object]
Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of the models whose operations are timed."""

    rows: tuple[int, ...]
    hidden: int
    inner: int
    heads: tuple[int, int]
    head_dim: int
    vocabulary: int
    experts: int
    top_k: int
    expert_hidden: int
    expert_inner: int


# Qwen3-0.6B, and the experts of Qwen3-30B-A3B.
REAL = Sizes((1, 16, 130, 256, 2048), 1024, 3072, (16, 8), 128, 151936, 128, 8, 2048, 768)
TINY = Sizes((1, 5), 64, 128, (4, 2), 16, 512, 8, 2, 64, 32)


@dataclass(frozen=True)
class Case:
    """Calls of an operation that are timed together. kernel: its hand-written kernel's name."""

    kernel: str
    rows: int
    works: list[Work]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device())


# -- kernels ---------------------------------------------------------------------------------------


def cases(sizes: Sizes) -> Iterator[Case]:
    """All operations that have both a kernel and a definition that a graph can record.

    The definition of `filter_threshold` reads numbers on the host, and so does that of
    `grouped_linear`.
    """
    for rows in sizes.rows:
        yield from dense_cases(sizes, rows)
        yield from expert_cases(sizes, rows)


def dense_cases(sizes: Sizes, rows: int) -> Iterator[Case]:
    from nanovllm import kernels

    x = random(rows, sizes.hidden)
    residual = random(rows, sizes.hidden)
    weight = random(sizes.hidden)
    gate_up = random(rows, 2 * sizes.inner)
    yield Case("rms_norm", rows, [lambda: kernels.rms_norm(x, weight, 1e-6)])
    yield Case("add_rms_norm", rows, [lambda: kernels.add_rms_norm(x, residual, weight, 1e-6)])
    yield Case("silu_and_mul", rows, [lambda: kernels.silu_and_mul(gate_up)])
    yield Case("gelu_and_mul", rows, [lambda: kernels.gelu_and_mul(gate_up)])
    yield Case("qk_norm_rope", rows, [write_work(sizes, rows)])
    if rows <= 256:  # more rows do not sample
        logits = random(rows, sizes.vocabulary)
        temperature = torch.full((rows,), 0.6, device=device())
        uniform = torch.rand(rows, device=device())
        yield Case("draw", rows, [lambda: kernels.draw(logits, temperature, uniform)])


def write_work(sizes: Sizes, rows: int) -> Work:
    """QK-norm, RoPE, and the K/V of `rows` tokens into pages, by the backend of the device."""
    from nanovllm.attention.base import AttentionSpec
    from nanovllm.attention.select import select_backend
    from nanovllm.cache.spec import PagedKV
    from nanovllm.core.batch import AttentionMetadata, ceil_div
    from nanovllm.kernels.rope import Rope

    heads, kv_heads = sizes.heads
    dim = sizes.head_dim
    page = 64
    spec = AttentionSpec((PagedKV(heads, kv_heads, dim),), page, torch.bfloat16, device())
    backend = select_backend(spec, None)
    pages = ceil_div(rows, page)
    backend.allocate(pages)
    tokens = torch.arange(rows, dtype=torch.int32, device=device())
    backend.begin(
        AttentionMetadata(
            positions=tokens,
            slot_mapping=tokens,
            query_start=torch.tensor([0, rows], dtype=torch.int32, device=device()),
            context_lens=torch.tensor([rows], dtype=torch.int32, device=device()),
            block_tables=torch.arange(pages, dtype=torch.int32, device=device())[None],
            max_query_len=rows,
            num_prefills=1,
            max_context_len=rows,
        )
    )
    rope = Rope(heads, kv_heads, dim, random(rows, dim).float(), random(dim), random(dim), 1e-6)
    qkv = random(rows, (heads + 2 * kv_heads) * dim)
    return lambda: backend.write(0, qkv, rope)


def expert_cases(sizes: Sizes, rows: int) -> Iterator[Case]:
    from nanovllm.kernels import moe

    experts = sizes.experts
    logits = random(rows, experts)
    routes = moe.route(logits, sizes.top_k, True)
    groups = moe.group_by_expert(routes.experts, 0, experts)
    gate_up = random(rows * sizes.top_k, 2 * sizes.expert_inner)
    y = random(rows * sizes.top_k, sizes.expert_hidden)
    yield Case("route", rows, [lambda: moe.route(logits, sizes.top_k, True)])
    yield Case("group_by_expert", rows, [lambda: moe.group_by_expert(routes.experts, 0, experts)])
    yield Case("combine", rows, [lambda: moe.combine(y, groups.rows, routes.weights)])
    yield Case("clamped_swiglu", rows, [lambda: moe.clamped_swiglu(gate_up, 1.702, 7.0)])


def kernels(tiny: bool) -> Result:
    """Which hand-written kernels are faster than their definitions, compiled by torch.compile."""
    from nanovllm.kernels.choice import KernelChoice

    # One choice for each kernel, because the compiled code belongs to its choice.
    default = KernelChoice(compiles=True)
    left_out: dict[str, KernelChoice] = {}
    rows = []
    ratios: dict[str, list[float]] = {}
    print("kernel           rows   kernel, us   compiled, us")
    for case in cases(TINY if tiny else REAL):
        name = case.kernel
        if name not in left_out:
            left_out[name] = KernelChoice(default.without | {name}, compiles=True)
        kernel = microseconds(case, default)
        compiled = microseconds(case, left_out[name])
        print(f"{name:16} {case.rows:4} {kernel:12.2f} {compiled:14.2f}", flush=True)
        rows.append(
            {"kernel": name, "rows": case.rows, "kernel_us": kernel, "compiled_us": compiled}
        )
        ratios.setdefault(name, []).append(compiled / kernel)
    verdicts = {name: verdict(found) for name, found in ratios.items()}
    for name, text in verdicts.items():
        print(f"{name}: {text}")
    summary = "; ".join(f"{name} {text}" for name, text in verdicts.items())
    ok = all(math.isfinite(row["kernel_us"]) for row in rows)
    return {"summary": summary, "ok": ok, "rows": rows}


def verdict(ratios: list[float]) -> str:
    """ratios: time of the compiled definition by the time of the kernel, for numbers of rows."""
    known = [ratio for ratio in ratios if math.isfinite(ratio)]
    if len(known) < len(ratios):
        return "keep: the definition does not run everywhere"
    mean = math.exp(sum(map(math.log, known)) / len(known))
    spread = f"{mean:.2f} times as fast ({min(known):.2f} to {max(known):.2f})"
    return f"keep, {spread}" if mean >= 1 else f"leave out, {spread}"


def microseconds(case: Case, choice: Any) -> float:
    """The time of one call. NaN, and a line of output, where it fails."""
    from nanovllm.kernels.choice import kernel_choice

    try:
        with kernel_choice(choice), torch.inference_mode():
            return 1e6 * seconds_each(case.works)
    except Exception as err:  # of torch.compile, or of what a graph cannot record
        print(f"{case.kernel} {case.rows}: {err!r}"[:500], flush=True)
        return math.nan


def seconds_each(works: list[Work], calls: int = 64, repeats: int = 15) -> float:
    """The median time of one call, of about `calls` calls in a CUDA graph.

    Without a GPU: the time of one call.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        works[0]()
        return time.perf_counter() - start
    from gpu.attention_bandwidth import seconds

    rounds = max(1, calls // len(works))

    def all_calls() -> None:
        for _ in range(rounds):
            for work in works:
                work()

    return seconds(all_calls, device(), repeats) / (rounds * len(works))


# -- products of few rows --------------------------------------------------------------------------

WEIGHT_BYTES = 256 << 20  # together: more than the caches of a GPU hold

# (model, product, N, K): x [T, K] times a matrix [N, K].
PRODUCTS = [
    ("0.6b", "qkv", 4096, 1024),
    ("0.6b", "o", 1024, 2048),
    ("0.6b", "gate_up", 6144, 1024),
    ("0.6b", "down", 1024, 3072),
    ("8b", "qkv", 6144, 4096),
    ("8b", "o", 4096, 4096),
    ("8b", "gate_up", 24576, 4096),
    ("8b", "down", 4096, 12288),
]
PRODUCT_ROWS = (1, 16, 64, 130, 256)


def products(tiny: bool) -> Result:
    """Our products of few rows beside torch's, which come from cuBLAS."""
    device_name()  # without a GPU, kernels run interpreted
    sizes = PRODUCTS
    numbers = PRODUCT_ROWS
    if tiny:
        sizes = [("tiny", "qkv", 128, 64), ("tiny", "gate_up", 256, 64)]
        numbers = (1, 5)
    found = []
    print("model product     rows   torch, us   ours, us")
    for model, product, features, depth in sizes:
        for rows in numbers:
            library, ours = product_times(product, rows, features, depth)
            print(f"{model:5} {product:9} {rows:6} {library:11.2f} {ours:10.2f}", flush=True)
            found.append(
                {
                    "model": model,
                    "product": product,
                    "rows": rows,
                    "torch_us": library,
                    "ours_us": ours,
                }
            )
    texts = []
    for model, product, _, _ in sizes:
        ratios = [
            row["torch_us"] / row["ours_us"]
            for row in found
            if (row["model"], row["product"]) == (model, product)
        ]
        texts.append(f"{model} {product} " + " ".join(f"{ratio:.2f}" for ratio in ratios))
    summary = f"times as fast as torch's with {numbers} rows: {'; '.join(texts)}"
    ok = all(math.isfinite(row["ours_us"]) for row in found)
    return {"summary": summary, "ok": ok, "rows": found}


def product_times(product: str, rows: int, features: int, depth: int) -> tuple[float, float]:
    """Microseconds of torch's product and of ours. gate_up: with SwiGLU after the product."""
    from torch.nn import functional as F

    from nanovllm import kernels
    from nanovllm.kernels import linear_triton
    from nanovllm.kernels.choice import KernelChoice

    x = random(rows, depth)
    count = max(1, WEIGHT_BYTES // (2 * features * depth)) if x.is_cuda else 1
    weights = [random(features, depth) for _ in range(count)]
    times = []
    for name, linear, swiglu in (
        ("torch", F.linear, lambda x, w, bias: kernels.silu_and_mul(F.linear(x, w, bias))),
        ("ours", linear_triton.linear, linear_triton.swiglu),
    ):
        function = swiglu if product == "gate_up" else linear
        works = [partial(function, x, weight, None) for weight in weights]
        case = Case(f"{name} {product} {features} x {depth}", rows, works)
        times.append(microseconds(case, KernelChoice()))
    return times[0], times[1]
