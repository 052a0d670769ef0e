"""The operations of a mixture of experts, each defined in plain PyTorch.

A route is one expert of one token. A step of T tokens always has T * top_k routes, so no
size depends on the data and no operation waits for the device. Rows of routes are sorted
by expert. An expert's rows then are neighbours, and a grouped product multiplies each
group of rows with the expert's own matrix. Kernels are in `moe_cpu` and `moe_triton`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm import kernels
from nanovllm.kernels import moe_cpu
from nanovllm.kernels.choice import compiled


class Routes(NamedTuple):
    """The experts of each token. Both tensors are [T, top_k].

    weights: float32, the share of the expert in the token's result. experts: int32.
    """

    weights: Tensor
    experts: Tensor


class Groups(NamedTuple):
    """Routes sorted by expert. All tensors are int32.

    tokens [T * top_k]: the token of each row. rows [T, top_k]: the row of each route.
    offsets [E + 1]: the rows of expert e begin at offsets[e] and end before offsets[e + 1].
    """

    tokens: Tensor
    rows: Tensor
    offsets: Tensor


@cache
def gpu() -> ModuleType | None:
    """`moe_triton`, or None where Triton cannot run kernels."""
    return None if kernels.gpu() is None else import_module("nanovllm.kernels.moe_triton")


def triton_for(x: Tensor, name: str) -> ModuleType | None:
    """`moe_triton` where its kernel `name` may compute x, else None: see `kernels.triton_for`."""
    return None if kernels.triton_for(x, name) is None else gpu()


def route(logits: Tensor, top_k: int, renormalise: bool) -> Routes:
    """logits [T, E] -> the top_k most likely experts of each token, the likeliest first.

    The softmax is computed in float32 over all experts. The lowest id wins a tie.
    renormalise: the weights of a token sum to 1.
    """
    if logits.is_cpu:
        found = moe_cpu.route(logits, top_k, renormalise)
        if found is not None:
            return Routes(*found)
    triton = triton_for(logits, "route")
    if triton is not None:
        return Routes(*triton.route(logits, top_k, renormalise))
    return _route(logits, top_k, renormalise)


@compiled("logits")
def _route(logits: Tensor, top_k: int, renormalise: bool) -> Routes:
    probs = torch.softmax(logits.float(), dim=-1)  # [T, E]
    ordered, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    weights = ordered[:, :top_k]
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routes(weights, ids[:, :top_k].int())


def group_by_expert(experts: Tensor, first: int, count: int) -> Groups:
    """experts [T, top_k] int32 -> the routes of the experts first .. first + count - 1.

    The routes of an expert stay in the order of tokens. Routes of other experts lie after
    all of these.
    """
    if experts.is_cpu:
        found = moe_cpu.group_by_expert(experts, first, count)
        if found is not None:
            return Groups(*found)
    triton = triton_for(experts, "group_by_expert")
    if triton is not None:
        return Groups(*triton.group_by_expert(experts, first, count))
    return _group_by_expert(experts, first, count)


@compiled("experts")
def _group_by_expert(experts: Tensor, first: int, count: int) -> Groups:
    num_tokens, top_k = experts.shape
    local = experts.flatten().long() - first
    is_foreign = (local < 0) | (local >= count)
    local = torch.where(is_foreign, count, local)
    ordered, routes = torch.sort(local, stable=True)
    rows = torch.empty_like(routes)
    rows[routes] = torch.arange(len(routes), device=routes.device)
    bounds = torch.arange(count + 1, device=routes.device)
    offsets = torch.searchsorted(ordered, bounds)
    tokens = routes // top_k
    return Groups(tokens.int(), rows.view(num_tokens, top_k).int(), offsets.int())


def gather(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows tokens [n] int32 of x [T, size] -> [n, size]."""
    if x.is_cpu:
        out = moe_cpu.gather(x, tokens)
        if out is not None:
            return out
    return _gather(x, tokens)


@compiled("x", "tokens")
def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    return x[tokens.long()]


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, K], of which group g has the rows offsets[g] .. offsets[g + 1] - 1 -> [n, N].

    weight [G * N, K] and bias [G * N] have one matrix for each group. A row after the last
    group gives zeros.
    """
    triton = triton_for(x, "grouped_linear")
    if triton is not None:
        return triton.grouped_linear(x, weight, offsets, bias)
    num_groups = len(offsets) - 1
    matrices = weight.view(num_groups, -1, weight.shape[1])  # [G, N, K]
    biases = None if bias is None else bias.view(num_groups, -1)
    out = x.new_zeros(x.shape[0], matrices.shape[1])
    for group, (start, stop) in enumerate(pairwise(offsets.tolist())):
        group_bias = None if biases is None else biases[group]
        out[start:stop] = F.linear(x[start:stop], matrices[group], group_bias)
    return out


def combine(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """y [n, size], rows and weights [T, top_k] -> [T, size]: the weighted sum of a token's rows.

    The sum is computed in float32, in the order of the routes.
    """
    if y.is_cpu:
        out = moe_cpu.combine(y, rows, weights)
        if out is not None:
            return out
    triton = triton_for(y, "combine")
    if triton is not None:
        return triton.combine(y, rows, weights)
    return _combine(y, rows, weights)


@compiled("y", "rows", "weights")
def _combine(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    total = torch.zeros(rows.shape[0], y.shape[1], device=y.device)
    for at in range(rows.shape[1]):
        total += weights[:, at, None] * y[rows[:, at].long()].float()
    return total.to(y.dtype)


def add_gated(out: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """out + sigmoid(gate) * x; out and x [T, size], gate [T, 1]. May overwrite `out`."""
    if out.is_cpu:
        both = moe_cpu.add_gated(out, x, gate)
        if both is not None:
            return both
    return _add_gated(out, x, gate)


@compiled("out", "x", "gate")
def _add_gated(out: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return (out.float() + torch.sigmoid(gate.float()) * x.float()).to(out.dtype)


def clamped_swiglu(x: Tensor, alpha: float, limit: float) -> Tensor:
    """[T, 2I] -> [T, I]: g * sigmoid(alpha * g) * (u + 1) of the halves g and u (gpt-oss).

    Before it g is clamped to at most `limit`, and u to -limit .. limit. The result is
    computed in float32.
    """
    if x.is_cpu:
        out = moe_cpu.clamped_swiglu(x, alpha, limit)
        if out is not None:
            return out
    triton = triton_for(x, "clamped_swiglu")
    if triton is not None:
        return triton.clamped_swiglu(x, alpha, limit)
    return _clamped_swiglu(x, alpha, limit)


@compiled("x")
def _clamped_swiglu(x: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(x.dtype)
