"""The operations of a mixture of experts as Triton kernels, for GPUs.

The size of every launch depends on shapes alone and no kernel waits for the host, so a
CUDA graph can capture all of them. Each kernel is tested against its definition in `moe`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (kernel parameters have no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.core.batch import ceil_div
from nanovllm.kernels.gpu_table import power_of_2
from nanovllm.kernels.linear_triton import product
from nanovllm.kernels.triton_ops import compute_type

ROUTE_BLOCK = 1024  # routes that a program of `_group_kernel` reads at once


@triton.jit
def _route_kernel(
    logits_ptr, weights_ptr, experts_ptr,
    E: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr,
    RENORMALISE: tl.constexpr,
):  # fmt: skip
    """One token: takes its likeliest expert, TOP_K times. CHOICES: TOP_K as a power of two."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    address = logits_ptr + token * E + expert
    logits = tl.load(address, mask=expert < E, other=float("-inf")).to(tl.float32)
    exponentials = tl.exp(logits - tl.max(logits))
    probs = exponentials / tl.sum(exponentials)
    probs = tl.where(expert < E, probs, -1.0)  # below each probability
    choice = tl.arange(0, CHOICES)
    weights = tl.zeros([CHOICES], tl.float32)
    experts = tl.zeros([CHOICES], tl.int32)
    for i in tl.static_range(TOP_K):
        most = tl.max(probs)
        # The bound keeps the id inside the experts where a logit is NaN.
        best = tl.min(tl.where((probs == most) & (expert < E), expert, E - 1))
        weights = tl.where(choice == i, most, weights)
        experts = tl.where(choice == i, best, experts)
        probs = tl.where(expert == best, -1.0, probs)
    if RENORMALISE:
        weights = weights / tl.sum(weights)
    place = token * TOP_K + choice
    tl.store(weights_ptr + place, weights, mask=choice < TOP_K)
    tl.store(experts_ptr + place, experts, mask=choice < TOP_K)


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> (weights float32 [T, top_k], experts int32 [T, top_k])."""
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    if tokens:
        sizes = (experts, power_of_2(experts), top_k, power_of_2(top_k))
        _route_kernel[(tokens,)](logits, weights, ids, *sizes, renormalise, num_warps=1)
    return weights, ids


@triton.jit(do_not_specialize=["num_routes", "first_expert"])
def _group_kernel(
    experts_ptr, tokens_ptr, rows_ptr, offsets_ptr, num_routes, first_expert,
    COUNT: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group: its routes, in their order. Group COUNT has the routes of other experts."""
    group = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)  # routes of earlier groups
    for start in range(0, num_routes, BLOCK):
        of = _group_of(experts_ptr, start + i, num_routes, first_expert, COUNT)
        before += (of < group).to(tl.int32)
    row = tl.sum(before)
    tl.store(offsets_ptr + group, row)
    for start in range(0, num_routes, BLOCK):
        route = start + i
        of = _group_of(experts_ptr, route, num_routes, first_expert, COUNT)
        mine = (of == group).to(tl.int32)
        place = row + tl.cumsum(mine) - 1
        tl.store(rows_ptr + route, place, mask=mine > 0)
        tl.store(tokens_ptr + place, route // TOP_K, mask=mine > 0)
        row += tl.sum(mine)


@triton.jit
def _group_of(experts_ptr, route, num_routes, first_expert, COUNT: tl.constexpr):
    """The group of each route. Beyond the last route: COUNT + 1, which no program has."""
    inside = route < num_routes
    group = tl.load(experts_ptr + route, mask=inside, other=0) - first_expert
    group = tl.where((group < 0) | (group >= COUNT), COUNT, group)
    return tl.where(inside, group, COUNT + 1)


def group_by_expert(experts: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """experts [T, top_k] int32 -> (tokens, rows, offsets), see `moe.Groups`.

    A counting sort. Each program reads all routes, because one launch of short programs
    costs less than the ten launches of a general sort.
    """
    experts = experts.contiguous()
    rows = torch.empty_like(experts)
    tokens = experts.new_empty(experts.numel())
    offsets = experts.new_empty(count + 1)
    _group_kernel[(count + 1,)](
        experts, tokens, rows, offsets, experts.numel(), first,
        count, experts.shape[1], ROUTE_BLOCK, num_warps=4,
    )  # fmt: skip
    return tokens, rows, offsets


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, offsets_ptr, num_rows,
    G: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one group times BLOCK_N rows of its matrix. GROUPS: above G, a power of two.

    Group G has the rows after the last group and gives zeros. A program finds its group by
    counting the tiles of all groups. Programs beyond the last tile do nothing.
    """
    tile = tl.program_id(0)
    each = tl.arange(0, GROUPS)
    begin = tl.load(offsets_ptr + each, mask=each <= G, other=num_rows)
    end = tl.load(offsets_ptr + each + 1, mask=each < G, other=num_rows)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    group = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))
    if group > G:
        return
    first = tl.sum(tl.where(each < group, tiles, 0))  # the first tile of the group
    stop = tl.sum(tl.where(each == group, end, 0))
    row = tl.sum(tl.where(each == group, begin, 0)) + (tile - first) * BLOCK_M
    row += tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if group < G:
        # Rows and columns beyond the end repeat the last one, because loads without a mask
        # of them are faster. They are not stored.
        x_row = tl.minimum(row, stop - 1)
        weight_row = group.to(tl.int64) * N + tl.minimum(column, N - 1)
        acc = product(
            x_ptr, weight_ptr, x_row, weight_row, 0, tl.cdiv(K, BLOCK_K),
            K, BLOCK_M, BLOCK_N, BLOCK_K, COMPUTE,
        )  # fmt: skip
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + group * N + column, mask=column < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * N + column[None, :]
    inside = (row < stop)[:, None] & (column < N)[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


def grouped_shape(rows: int, num_groups: int, dtype: torch.dtype) -> dict[str, int]:
    """Launch options that compile without spilling registers.

    BLOCK_M follows the mean number of rows of a group. A step of few tokens reads much
    weight for each row, so its tiles are long in K.
    """
    if dtype == torch.float32:  # tensor cores would round float32 to TF32
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    block = min(max(power_of_2(ceil_div(rows, num_groups)), 16), 128)
    if block <= 32:
        return {"BLOCK_M": block, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    warps = block // 16
    return {"BLOCK_M": block, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": warps, "num_stages": 3}


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, K], weight [G * N, K], offsets int32 [G + 1], bias [G * N] -> [n, N].

    The number of programs is the largest number of tiles that n rows in G groups and a rest
    can have. So it does not depend on the offsets.
    """
    x = x.contiguous()
    rows, depth = x.shape
    num_groups = len(offsets) - 1
    features = weight.shape[0] // num_groups
    out = x.new_empty(rows, features)
    shape = grouped_shape(rows, num_groups, x.dtype)
    tiles = min(rows, rows // shape["BLOCK_M"] + num_groups + 1)
    if rows:
        grid = (tiles, ceil_div(features, shape["BLOCK_N"]))
        _grouped_kernel[grid](
            x, weight, bias, out, offsets, rows,
            G=num_groups, GROUPS=power_of_2(num_groups + 1), N=features, K=depth,
            COMPUTE=compute_type(x.dtype), **shape,
        )  # fmt: skip
    return out


@triton.jit
def _combine_kernel(
    y_ptr, rows_ptr, weights_ptr, out_ptr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one token: the weighted sum of its TOP_K rows, in the order of routes."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(rows_ptr + token * TOP_K + choice).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOP_K + choice)
        y = tl.load(y_ptr + row * SIZE + i, mask=i < SIZE, other=0.0)
        total += weight * y.to(tl.float32)
    tl.store(out_ptr + token * SIZE + i, total.to(out_ptr.dtype.element_ty), mask=i < SIZE)


def combine(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """y [n, size], rows int32 and weights float32 [T, top_k] -> [T, size]."""
    y = y.contiguous()
    tokens, top_k = rows.shape
    size = y.shape[1]
    out = y.new_empty(tokens, size)
    if tokens:
        grid = (tokens, ceil_div(size, 1024))
        _combine_kernel[grid](
            y, rows.contiguous(), weights.contiguous(), out, size, 1024, top_k, num_warps=4
        )
    return out


@triton.jit
def _clamped_swiglu_kernel(
    x_ptr, out_ptr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """BLOCK of the SIZE outputs of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * (2 * SIZE) + i, mask=i < SIZE, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * SIZE) + SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, LIMIT)
    up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    out = gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
    tl.store(out_ptr + row * SIZE + i, out.to(out_ptr.dtype.element_ty), mask=i < SIZE)


def clamped_swiglu(x: Tensor, alpha: float, limit: float) -> Tensor:
    """[T, 2I] -> [T, I], see `moe.clamped_swiglu`."""
    x = x.contiguous()
    size = x.shape[1] // 2
    out = x.new_empty(len(x), size)
    if len(x):
        grid = (len(x), ceil_div(size, 1024))
        _clamped_swiglu_kernel[grid](x, out, size, 1024, alpha, limit, num_warps=4)
    return out
