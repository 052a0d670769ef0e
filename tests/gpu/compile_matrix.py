"""What every kernel takes on every kind of GPU, as a table. No GPU takes part.

    PYTHONPATH=.:tests python tests/gpu/compile_matrix.py [--capabilities 90 120]

A cell has the registers of a thread, the KB of shared memory of a program, and how many programs
a multiprocessor runs at once; then the bytes that a thread spills, if it spills. "too much" marks
shared memory above what the GPU has. The last line counts such cells and spills.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import triton
from kernel_compiler import NoDevice, Usage, attend_once, compiling_for, usage

from nanovllm.kernels import linear_triton, moe_triton, triton_ops
from nanovllm.kernels.gpu_table import TABLE, gpu_kind
from nanovllm.kernels.rope import Rope

ATTENTION = {  # name -> (heads, head_dim, block_size, window, kv_cache_dtype)
    "Qwen3-0.6B": ((16, 8), 128, 64, None, "auto"),
    "Qwen3-8B, page 16": ((32, 8), 128, 16, None, "auto"),
    "FP8": ((16, 8), 128, 64, None, "fp8"),
    "FP8, page 16": ((32, 8), 128, 16, None, "fp8"),
    "head 64": ((9, 3), 64, 64, None, "auto"),
    "head 256": ((8, 4), 256, 64, 512, "auto"),
    "FP8, head 256": ((8, 4), 256, 64, 512, "fp8"),
}
ROWS = (1, 32, 200)  # of products


def attention(name: str, dtype: torch.dtype) -> None:
    *shape, cache = ATTENTION[name]
    attend_once(*shape, dtype, cache)


def linear(rows: int, dtype: torch.dtype) -> None:
    x = torch.zeros(rows, 3072, dtype=dtype)
    linear_triton.linear(x, torch.zeros(1024, 3072, dtype=dtype), None)


def swiglu(rows: int, dtype: torch.dtype) -> None:
    x = torch.zeros(rows, 1024, dtype=dtype)
    linear_triton.swiglu(x, torch.zeros(6144, 1024, dtype=dtype), None)


def elementwise(dtype: torch.dtype) -> None:
    """Norm, activation and the write of K and V, in the sizes of Qwen3-0.6B."""
    x = torch.zeros(2, 4096, dtype=dtype)
    triton_ops.add_rms_norm(x[:, :1024].contiguous(), x[:, :1024].contiguous(), x[0, :1024], 1e-6)
    triton_ops.silu_and_mul(x)
    slots = torch.zeros(2, dtype=torch.int32)
    weight = torch.zeros(128, dtype=dtype)
    rope = Rope(16, 8, 128, torch.zeros(64, 128), weight, weight, 1e-6)
    pages = torch.zeros(2, 4, 8, 64, 128, dtype=dtype)
    triton_ops.write_qkv(x, slots, slots, rope, *pages)


def sampling(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 151936, dtype=dtype)
    row = torch.zeros(2)
    top_k = torch.zeros(2, dtype=torch.int32)
    threshold = triton_ops.filter_threshold(logits, row, top_k, row, row)
    triton_ops.draw(logits, row, row, threshold)


def experts(tokens: int, dtype: torch.dtype) -> None:
    """The grouped product of Qwen3-30B-A3B."""
    count, inner, hidden = 128, 768, 2048
    rows = tokens * 8
    weight = torch.zeros(1, dtype=dtype).expand(count * 2 * inner, hidden)
    offsets = torch.zeros(count + 1, dtype=torch.int32)
    moe_triton.grouped_linear(torch.zeros(rows, hidden, dtype=dtype), weight, offsets, None)


def launches() -> dict[str, Callable[[torch.dtype], None]]:
    """What is compiled, by its name in the table."""
    found: dict[str, Callable[[torch.dtype], None]] = {}
    for name in ATTENTION:
        found[name] = lambda dtype, name=name: attention(name, dtype)
    for rows in ROWS:
        found[f"{rows} rows"] = lambda dtype, rows=rows: (linear(rows, dtype), swiglu(rows, dtype))
    found[""] = lambda dtype: (elementwise(dtype), sampling(dtype))
    for tokens in (16, 2048):
        found[f"experts, {tokens} tokens"] = lambda dtype, tokens=tokens: experts(tokens, dtype)
    return found


def compiled_for(capability: int, name: str, launch: Callable[[torch.dtype], None]) -> list[Usage]:
    """The kernels of a launch. None of them where the GPU lacks what the launch needs."""
    kind = gpu_kind(divmod(capability, 10))
    if name.startswith("FP8") and capability < 89:
        return []
    if name.endswith("rows") and not kind.few_rows:
        return []
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    with compiling_for(NoDevice(capability)) as kernels:
        launch(dtype)
    return [usage(kernel) for kernel in kernels]


def cell(found: Usage, capability: int) -> str:
    kind = gpu_kind(divmod(capability, 10))
    text = f"{found.registers} / {found.shared / 1024:.0f} / {found.programs(kind)}"
    if found.spilled:
        text += f" +{found.spilled}"
    if found.shared > kind.program_memory * 1024:
        text += " too much"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [10 * major + minor for major, minor in TABLE if (major, minor) != (8, 7)]
    parser.add_argument("--capabilities", type=int, nargs="+", default=known)
    capabilities = parser.parse_args().capabilities
    cells: dict[str, dict[int, str]] = {}
    for name, launch in launches().items():
        for capability in capabilities:
            for found in compiled_for(capability, name, launch):
                kernel = found.name.strip("_").removesuffix("_kernel")
                # The plan of a step depends on no size of heads.
                label = kernel if kernel == "plan" else f"{kernel} {name}".strip()
                cells.setdefault(label, {})[capability] = cell(found, capability)
    print(f"triton {triton.__version__}: registers / KB / programs a multiprocessor +spilled\n")
    print("| kernel |", " | ".join(f"sm_{each}" for each in capabilities), "|")
    print("| --- |", " | ".join("---" for _ in capabilities), "|")
    for label, row in cells.items():
        print("|", label, "|", " | ".join(row.get(each, "-") for each in capabilities), "|")
    every = [text for row in cells.values() for text in row.values()]
    spills = sum("+" in text for text in every)
    too_much = sum("too much" in text for text in every)
    print(f"\n{len(every)} kernels, {spills} spill, {too_much} do not fit")


if __name__ == "__main__":
    main()
