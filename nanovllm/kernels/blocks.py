"""Products with matrices in the block formats of GGUF files, through blocks.cpp.

A matrix is bytes in panels and a table of segments. A segment is consecutive output
features of one type. This file knows pointers and shapes, not files or layers.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels import cpu, library

SOURCE = Path(__file__).with_suffix(".cpp")
# The types with kernels, and the numbers that GGUF files give to them.
TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "BF16": 30,
    "MXFP4": 39,
}
CACHE_LINE = 64  # bytes; segments begin at multiples of it


class Segment(NamedTuple):
    """Consecutive output features of one type: blocks.cpp's Segment.

    offset: of the first panel in the matrix, in bytes. first: the first output feature.
    """

    type: int
    offset: int
    first: int
    features: int


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library of blocks.cpp. None, with a warning, where it cannot be built or loaded."""
    built = library.load(SOURCE)
    if built is not None:
        integer = ctypes.c_int64  # an address too
        built.packed_bytes.restype = integer
        built.packed_bytes.argtypes = [integer] * 3
        built.pack.restype = None
        built.pack.argtypes = [integer] * 7
    return built


@functools.cache
def kernel(name: str, dtype: torch.dtype) -> cpu.Kernel:
    """The C++ function `name` for inputs of this dtype."""
    built = load()
    assert built is not None
    function = getattr(built, f"{name}_{cpu.DTYPES[dtype]}")
    function.argtypes = [ctypes.c_void_p]
    function.restype = None
    return function


def packed_bytes(type: int, features: int, depth: int) -> int:
    """Bytes of `features` rows of `depth` weights in panels."""
    built = load()
    assert built is not None
    return built.packed_bytes(type, features, depth)


def pack(type: int, rows: np.ndarray, row_order: np.ndarray, depth: int, out: Tensor) -> None:
    """Puts rows of a file into panels.

    rows: uint8 [rows of the file, bytes of `depth` weights]. row_order: int64 [features], the row
    of the file for each feature. out: uint8 [packed_bytes].
    """
    assert rows.strides[1] == 1
    assert row_order.dtype == np.int64
    assert row_order.flags.c_contiguous
    built = load()
    assert built is not None
    source = (rows.ctypes.data, rows.strides[0], row_order.ctypes.data)
    built.pack(type, *source, len(row_order), depth, out.data_ptr())


def linear(
    x: Tensor, weight: Tensor, segments: Tensor, bias: Tensor | None, features: int
) -> Tensor:
    """x [T, K] @ matrix [features, K].T + bias -> [T, features].

    weight: uint8, the panels. segments: int64 [number, 4], a Segment a row.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, depth = x.shape
    out = cpu.empty((rows, features), x.dtype)
    table = (segments.data_ptr(), len(segments))
    bias_address = 0 if bias is None else bias.data_ptr()
    cpu.call(
        kernel("linear_blocks", x.dtype),
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        *table,
        bias_address,
        out.data_ptr(),
        rows,
        features,
        depth,
    )
    return out


def grouped(
    x: Tensor,
    weight: Tensor,
    segments: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    features: int,
) -> Tensor:
    """`moe.grouped_linear` of a matrix [features, K]. Its groups have equally many segments."""
    assert offsets.dtype is torch.int32
    x = x.contiguous()
    rows, depth = x.shape
    num_groups = len(offsets) - 1
    assert len(segments) % num_groups == 0
    columns = features // num_groups
    out = cpu.empty((rows, columns), x.dtype)
    table = (segments.data_ptr(), len(segments) // num_groups)
    bias_address = 0 if bias is None else bias.data_ptr()
    cpu.call(
        kernel("grouped_blocks", x.dtype),
        x.data_ptr(),
        weight.data_ptr(),
        *table,
        bias_address,
        out.data_ptr(),
        offsets.data_ptr(),
        num_groups,
        rows,
        columns,
        depth,
    )
    return out


def embedding(
    ids: Tensor, weight: Tensor, segments: Tensor, depth: int, dtype: torch.dtype
) -> Tensor:
    """Rows ids [T] int64 of a matrix -> [T, depth]. An id outside the matrix gives zeros."""
    out = cpu.empty((len(ids), depth), dtype)
    table = (segments.data_ptr(), len(segments))
    addresses = (ids.data_ptr(), weight.data_ptr(), *table, out.data_ptr())
    cpu.call(kernel("embed_blocks", dtype), *addresses, len(ids), depth)
    return out
