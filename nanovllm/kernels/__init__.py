"""The operations that models are made of, each as its plain PyTorch definition.

Where a faster twin exists for the tensor's device it is used instead; the definition here stays the specification that
the twin is tested against.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels import cpu
from nanovllm.kernels.rope import Rope

logger = logging.getLogger("nanovllm")


@cache
def gpu() -> Any:
    """`triton_ops`, or None where Triton does not import. Asked for by the first tensor on a GPU: it takes half a second."""
    try:
        return import_module("nanovllm.kernels.triton_ops")
    except ImportError as err:
        logger.warning("Triton does not import (%s): the GPU runs plain PyTorch, which is several times slower", err)
        return None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32 and rounded before the product."""
    if x.is_cpu and (out := cpu.rms_norm(x, weight, eps)) is not None:
        return out
    if x.is_cuda and gpu():
        return gpu().rms_norm(x, weight, eps)
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + x), residual + x); may overwrite both inputs."""
    if x.is_cpu and (both := cpu.add_rms_norm(x, residual, weight, eps)) is not None:
        return both
    if x.is_cuda and gpu():
        return gpu().add_rms_norm(x, residual, weight, eps)
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def silu_and_mul(x: Tensor) -> Tensor:
    """[T, 2I] -> [T, I]: silu of the first half times the second (SwiGLU, Shazeer, 2020)."""
    if x.is_cpu and (out := cpu.silu_and_mul(x)) is not None:
        return out
    if x.is_cuda and gpu():
        return gpu().silu_and_mul(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K] @ weight [N, K].T + bias [N] -> [T, N]."""
    if x.is_cpu and (out := cpu.linear(x, weight, bias)) is not None:
        return out
    return F.linear(x, weight, bias)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows ids [T] of weight [N, K] -> [T, K]."""
    if ids.is_cpu and (out := cpu.embedding(ids, weight)) is not None:
        return out
    return F.embedding(ids, weight)


def qk_norm_rope(qkv: Tensor, positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """An RMSNorm of each head of Q and K where the model has one, then rotary embedding (Su et al., 2021).

    qkv [T, (Hq + 2 Hkv) D], positions [T] -> q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]. The embedding is in the
    half-split form that checkpoints use.
    """
    heads = qkv.view(qkv.shape[0], -1, rope.head_dim)
    q, k, v = heads.split([rope.num_heads, rope.num_kv_heads, rope.num_kv_heads], dim=1)
    if rope.q_norm is not None and rope.k_norm is not None:
        q, k = rms_norm(q, rope.q_norm, rope.eps), rms_norm(k, rope.k_norm, rope.eps)
    cos, sin = rope.cos_sin[positions.long()].to(qkv.dtype).unsqueeze(1).chunk(2, dim=-1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pair (x[i], x[i + D/2]) by the i-th angle; x [T, heads, D], cos and sin [T, 1, D/2]."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def draw(logits: Tensor, temperature: Tensor, u: Tensor, threshold: Tensor | None = None) -> Tensor:
    """Draws from softmax(logits / temperature) by inverse CDF: logits [R, V], temperature and u [R] -> ids [R] int64.

    The token is the first in vocabulary order whose cumulative probability exceeds u, among those that are not 0; at
    temperature 0 the first of the largest logits. Logits below `threshold` [R] do not take part.
    """
    if logits.is_cuda and gpu():
        return gpu().draw(logits, temperature, u, threshold)
    if threshold is not None:
        logits = logits.masked_fill(logits < threshold[:, None], float("-inf"))
    if logits.is_cpu and (ids := cpu.draw(logits, temperature, u)) is not None:
        return ids
    greedy = temperature == 0
    probs = (logits.float() / temperature.masked_fill(greedy, 1)[:, None]).softmax(-1)
    mass = probs.cumsum(-1)
    beyond = (mass > u[:, None] * mass[:, -1:]) & (probs > 0)
    return torch.where(greedy, logits.argmax(-1), beyond.int().argmax(-1))


def argmax(logits: Tensor) -> Tensor:
    """[K, V] -> [K] int64: the id of the largest logit of each row, the first of several."""
    if logits.is_cpu:
        zeros = torch.zeros(len(logits))
        if (ids := cpu.draw(logits, zeros, zeros)) is not None:
            return ids
    return logits.argmax(-1)
