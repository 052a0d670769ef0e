"""The CPU's kernels of a mixture of experts, through moe_cpu.cpp.

Each function is an operation of `moe` and returns None where its kernel cannot run. This
file knows pointers and shapes, not models.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.kernels import cpu, library

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library of moe_cpu.cpp. None, with a warning, where it cannot be built or loaded."""
    return library.load(SOURCE)


@functools.cache
def kernel(name: str, dtype: torch.dtype | None = None) -> cpu.Kernel | None:
    """The C++ function `name`, for this dtype if it has a dtype; None where there is none."""
    built = load() if dtype is None or dtype in cpu.DTYPES else None
    if built is None:
        return None
    function = getattr(built, name if dtype is None else f"{name}_{cpu.DTYPES[dtype]}")
    function.argtypes = [ctypes.c_void_p]
    function.restype = None
    return function


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor] | None:
    """logits [T, E] -> (weights float32 [T, top_k], experts int32 [T, top_k])."""
    run = kernel("route", logits.dtype)
    if run is None or logits.stride(1) != 1:
        return None
    num_tokens, num_experts = logits.shape
    weights = cpu.empty((num_tokens, top_k), torch.float32)
    experts = cpu.empty((num_tokens, top_k), torch.int32)
    places = (logits.data_ptr(), logits.stride(0), weights.data_ptr(), experts.data_ptr())
    cpu.call(run, *places, num_tokens, num_experts, top_k, int(renormalise))
    return weights, experts


def group_by_expert(
    experts: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """experts [T, top_k] int32 -> (tokens [T * top_k], rows [T, top_k], offsets [count + 1])."""
    run = kernel("group_by_expert")
    if run is None or experts.dtype is not torch.int32 or not experts.is_contiguous():
        return None
    num_tokens, top_k = experts.shape
    tokens = cpu.empty((num_tokens * top_k,), torch.int32)
    rows = cpu.empty((num_tokens, top_k), torch.int32)
    offsets = cpu.empty((count + 1,), torch.int32)
    places = (experts.data_ptr(), tokens.data_ptr(), rows.data_ptr(), offsets.data_ptr())
    cpu.call(run, *places, num_tokens * top_k, top_k, first, count)
    return tokens, rows, offsets


def gather(x: Tensor, tokens: Tensor) -> Tensor | None:
    """Rows tokens [n] int32 of x [T, size] -> [n, size]."""
    run = kernel("gather", x.dtype)
    if run is None or x.stride(1) != 1 or tokens.dtype is not torch.int32:
        return None
    out = cpu.empty((len(tokens), x.shape[1]), x.dtype)
    places = (x.data_ptr(), x.stride(0), tokens.data_ptr(), out.data_ptr())
    cpu.call(run, *places, len(tokens), x.shape[1])
    return out


def combine(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor | None:
    """y [n, size], rows int32 and weights float32 [T, top_k] -> [T, size]."""
    run = kernel("combine", y.dtype)
    if run is None or rows.dtype is not torch.int32 or weights.dtype is not torch.float32:
        return None
    if not (y.is_contiguous() and rows.is_contiguous() and weights.is_contiguous()):
        return None
    num_tokens, top_k = rows.shape
    out = cpu.empty((num_tokens, y.shape[1]), y.dtype)
    places = (y.data_ptr(), rows.data_ptr(), weights.data_ptr(), out.data_ptr())
    cpu.call(run, *places, num_tokens, top_k, y.shape[1])
    return out


def add_gated(out: Tensor, x: Tensor, gate: Tensor) -> Tensor | None:
    """Overwrites out [T, size] with out + sigmoid(gate [T, 1]) * x [T, size]."""
    run = kernel("add_gated", out.dtype)
    if run is None or x.dtype is not out.dtype or gate.dtype is not out.dtype:
        return None
    if not (out.is_contiguous() and x.is_contiguous() and gate.is_contiguous()):
        return None
    cpu.call(run, out.data_ptr(), x.data_ptr(), gate.data_ptr(), *out.shape)
    return out


def clamped_swiglu(x: Tensor, alpha: float, limit: float) -> Tensor | None:
    """[T, 2I] -> [T, I]."""
    run = kernel("clamped_swiglu", x.dtype)
    if run is None or x.stride(1) != 1:
        return None
    size = x.shape[1] // 2
    out = cpu.empty((x.shape[0], size), x.dtype)
    numbers = (cpu.float_bits(alpha), cpu.float_bits(limit))
    call = (x.data_ptr(), x.stride(0), *numbers, out.data_ptr())
    cpu.call(run, *call, x.shape[0], size)
    return out
