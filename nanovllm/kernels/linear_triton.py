"""Products of few rows with a large matrix as Triton kernels, for decode steps on GPUs.

Such a product reads the matrix once and computes little, so it takes as long as its reads.
A library splits the output into tiles, and a narrow matrix has fewer tiles than the GPU has
multiprocessors. `linear` also splits the inputs: each program multiplies a part of K, and
the last program of a tile to finish adds the parts, always in the same order. `swiglu`
needs no split, because gate and up are wide; it saves a kernel and a pass over memory.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (kernel parameters have no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nanovllm.core.batch import ceil_div
from nanovllm.kernels import gpu_table
from nanovllm.kernels.gpu_table import few_rows_shape, split_depth
from nanovllm.kernels.triton_ops import compute_type, launch_next, pdl, wait

# The counters of a matrix: how many programs of each tile have finished. They belong to the
# matrix, because an engine never runs two products of one matrix at once.
ARRIVED = WeakTensorKeyDictionary()
COUNTERS = 256  # tiles that are split: at most half of the multiprocessors


@triton.jit
def product(
    x_ptr, weight_ptr, x_row, weight_row, begin, end, K: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Rows of x times rows of the matrix over the blocks begin:end of K.

    Returns [BLOCK_M, COLUMNS] float32.
    """
    k = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + x_row.to(tl.int64)[:, None] * K + k[None, :]
    weight_tile = weight_ptr + weight_row.to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for start in range(begin * BLOCK_K, end * BLOCK_K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_tile + start)
            weight = tl.load(weight_tile + start)
        else:
            inside = (start + k < K)[None, :]
            x = tl.load(x_tile + start, mask=inside, other=0.0)
            weight = tl.load(weight_tile + start, mask=inside, other=0.0)
        weight = tl.trans(weight.to(COMPUTE))
        acc = tl.dot(x.to(COMPUTE), weight, acc, input_precision="ieee")
    return acc


@triton.jit
def _with_bias(acc, bias_ptr, weight_row):
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + weight_row).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["num_rows", "splits", "share"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr, num_rows, splits, share,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of the output over `share` blocks of K. splits: the programs of a tile."""
    wait(PDL)
    split = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end repeat the last one, because loads without a mask of
    # them are faster. They are not stored.
    x_row = tl.minimum(row, num_rows - 1)
    weight_row = tl.minimum(column, N - 1)
    end = tl.minimum((split + 1) * share, tl.cdiv(K, BLOCK_K))
    acc = product(
        x_ptr, weight_ptr, x_row, weight_row, split * share, end,
        K, BLOCK_M, BLOCK_N, BLOCK_K, COMPUTE,
    )  # fmt: skip
    launch_next(PDL)
    is_last = splits == 1
    if splits > 1:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        inner = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        partial = partial_ptr + tile * splits * SIZE + inner
        tl.store(partial + split * SIZE, acc)
        tl.debug_barrier()  # all threads have stored before one counts the arrival
        is_last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == splits - 1
        if is_last:
            tl.store(arrived_ptr + tile, 0)  # for the next launch
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for i in range(splits):
                # .cg loads from L2, because L1 does not see the stores of other
                # multiprocessors.
                acc += tl.load(partial + i * SIZE, cache_modifier=".cg")
    if is_last:
        acc = _with_bias(acc, bias_ptr, weight_row)
        out = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
        inside = (row < num_rows)[:, None] & (column < N)[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of the N outputs. Row n of the matrix gives the gate of output n, row N + n its up.

    Gates and ups alternate in the product, so a thread has both numbers of an output.
    """
    wait(PDL)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    alternating = tl.arange(0, 2 * BLOCK_N)
    output = tl.minimum(tl.program_id(0) * BLOCK_N + alternating // 2, N - 1)
    weight_row = output + alternating % 2 * N
    acc = product(
        x_ptr, weight_ptr, tl.minimum(row, num_rows - 1), weight_row, 0, tl.cdiv(K, BLOCK_K),
        K, BLOCK_M, 2 * BLOCK_N, BLOCK_K, COMPUTE,
    )  # fmt: skip
    launch_next(PDL)
    acc = _with_bias(acc, bias_ptr, weight_row)
    dtype = out_ptr.dtype.element_ty
    acc = acc.to(dtype).to(tl.float32)  # `silu_and_mul` gets a rounded product
    gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N, 2]))
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    out = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    inside = (row < num_rows)[:, None] & (column < N)[None, :]
    tl.store(out, (activated * up).to(dtype), mask=inside)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K] @ weight [N, K].T + bias [N] -> [T, N], rounded once."""
    x = x.contiguous()
    rows, depth = x.shape
    features = weight.shape[0]
    gpu = gpu_table.device_properties(x.device)
    shape = few_rows_shape(gpu.kind, rows, columns=64)
    tiles = (ceil_div(features, shape["BLOCK_N"]), ceil_div(rows, shape["BLOCK_M"]))
    num_tiles = tiles[0] * tiles[1]
    splits, share = split_depth(gpu, num_tiles, ceil_div(depth, shape["BLOCK_K"]))
    out = x.new_empty(rows, features)
    partial_size = num_tiles * splits * shape["BLOCK_M"] * shape["BLOCK_N"]
    partial = torch.empty(partial_size if splits > 1 else 0, device=x.device)
    grid = (*tiles, splits)
    _linear_kernel[grid](
        x, weight, bias, out, partial, counters(weight), rows, splits, share,
        N=features, K=depth, COMPUTE=compute_type(x.dtype), **shape, **pdl(x.device),
    )  # fmt: skip
    return out


def counters(weight: Tensor) -> Tensor:
    """The counters of this matrix, all 0 between two products."""
    found: Tensor | None = ARRIVED.get(weight)
    if found is None:
        found = torch.zeros(COUNTERS, dtype=torch.int32, device=weight.device)
        ARRIVED[weight] = found
    return found


def swiglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K], weight [2N, K], bias [2N] -> [T, N]: `silu_and_mul` of the rounded product."""
    x = x.contiguous()
    rows, depth = x.shape
    features = weight.shape[0] // 2
    gpu = gpu_table.device_properties(x.device)
    shape = few_rows_shape(gpu.kind, rows, columns=32)
    out = x.new_empty(rows, features)
    grid = (ceil_div(features, shape["BLOCK_N"]), ceil_div(rows, shape["BLOCK_M"]))
    _swiglu_kernel[grid](
        x, weight, bias, out, rows,
        N=features, K=depth, COMPUTE=compute_type(x.dtype), **shape, **pdl(x.device),
    )  # fmt: skip
    return out
