"""The operations that models are made of, each defined in plain PyTorch.

A tensor's device may have a faster kernel for an operation (`cpu`, `triton_ops`). Then
the kernel runs. The definition here is the specification that the kernel is tested
against. `_name` is the definition of `name`. On a GPU torch.compile compiles it where no
kernel runs (`choice.py`).
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels import cpu, gpu_table
from nanovllm.kernels.choice import compiled, has_kernel
from nanovllm.kernels.rope import Rope

logger = logging.getLogger("nanovllm")


@cache
def gpu() -> ModuleType | None:
    """`triton_ops`, or None where Triton cannot run kernels. Then one warning says why.

    The first tensor on a GPU imports it, because the import of Triton is slow. Triton also
    builds a module for its launches, with a C compiler. An image without one would
    otherwise fail in the first launch.
    """
    try:
        triton_ops = import_module("nanovllm.kernels.triton_ops")
        if not triton_ops.INTERPRETED:
            import_module("triton.runtime").driver.active.get_current_target()
    except Exception as err:  # of any type: a missing compiler, header, library or driver
        logger.warning(
            "Triton cannot run kernels here (%s: %s): the GPU runs plain PyTorch, which is much "
            "slower. Triton needs a C compiler and Python's headers: install gcc and python3-dev",
            type(err).__name__,
            err,
        )
        return None
    return triton_ops


def triton_for(x: Tensor, name: str) -> ModuleType | None:
    """`triton_ops` where its kernel `name` may compute x, else None.

    x must lie on a GPU, Triton must run, and the engine must not have left the kernel out.
    torch.compile sees definitions alone, because it fuses them with what is around them.
    """
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    return gpu() if has_kernel(name) else None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, round_once: bool = False
) -> Tensor:
    """(weight + offset) * x / sqrt(mean(x^2) + eps) over the last dimension.

    The quotient is computed in float32 and rounded to the type of x before the product, as
    in Llama. round_once: only the product is rounded, as in Gemma. Gemma stores weights
    that lack an offset of 1.
    """
    if x.is_cpu:
        out = cpu.rms_norm(x, weight, eps, offset, round_once)
        if out is not None:
            return out
    triton = triton_for(x, "rms_norm")
    if triton is not None:
        return triton.rms_norm(x, weight, eps, offset, round_once)
    return _rms_norm(x, weight, eps, offset, round_once)


@compiled("x")
def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, round_once: bool) -> Tensor:
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    normed = x32 * scale
    if not round_once:
        normed = normed.to(x.dtype)
    factors = weight.float() + offset if offset else weight
    return (factors * normed).to(x.dtype)


def rms_norm_in_place(x: Tensor, weight: Tensor, eps: float, round_once: bool = False) -> Tensor:
    """`rms_norm` that overwrites x [T, size]. x may be some columns of a larger matrix."""
    if x.is_cpu and cpu.rms_norm_in_place(x, weight, eps, round_once):
        return x
    return x.copy_(rms_norm(x, weight, eps, round_once=round_once))


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    round_once: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + x), residual + x). May overwrite both inputs."""
    if x.is_cpu:
        both = cpu.add_rms_norm(x, residual, weight, eps, offset, round_once)
        if both is not None:
            return both
    triton = triton_for(x, "add_rms_norm")
    if triton is not None:
        return triton.add_rms_norm(x, residual, weight, eps, offset, round_once)
    return _add_rms_norm(x, residual, weight, eps, offset, round_once)


@compiled("x", "residual")
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_once: bool
) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return _rms_norm(residual, weight, eps, offset, round_once), residual


def silu_and_mul(x: Tensor) -> Tensor:
    """[T, 2I] -> [T, I]: silu of the first half times the second half (SwiGLU, Shazeer, 2020)."""
    if x.is_cpu:
        out = cpu.silu_and_mul(x)
        if out is not None:
            return out
    triton = triton_for(x, "silu_and_mul")
    if triton is not None:
        return triton.silu_and_mul(x)
    return _silu_and_mul(x)


@compiled("x")
def _silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul(x: Tensor) -> Tensor:
    """[T, 2I] -> [T, I]: gelu of the first half, by its tanh formula, times the second half."""
    if x.is_cpu:
        out = cpu.gelu_and_mul(x)
        if out is not None:
            return out
    triton = triton_for(x, "gelu_and_mul")
    if triton is not None:
        return triton.gelu_and_mul(x)
    return _gelu_and_mul(x)


@compiled("x")
def _gelu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, both [T, size]. May overwrite x."""
    if x.is_cpu:
        out = cpu.add(x, y)
        if out is not None:
            return out
    return _add(x, y)


@compiled("x", "y")
def _add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def scale(x: Tensor, factor: float) -> Tensor:
    """x * factor, [T, size]. May overwrite x."""
    if x.is_cpu:
        out = cpu.scale(x, factor)
        if out is not None:
            return out
    return _scale(x, factor)


@compiled("x")
def _scale(x: Tensor, factor: float) -> Tensor:
    return x * factor


@compiled("x")
def softcap(x: Tensor, cap: float) -> Tensor:
    """Pulls the numbers of x [K, size] smoothly into -cap .. cap (Gemma 2)."""
    return torch.tanh(x / cap) * cap


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K] @ weight [N, K].T + bias [N] -> [T, N]."""
    if x.is_cpu and not torch.compiler.is_compiling():
        out = cpu.linear(x, weight, bias)
        if out is not None:
            return out
    triton = few_rows_for(x, weight, "few_rows_linear")
    if triton is not None:
        return triton.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def swiglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`silu_and_mul` of a product: x [T, K], weight [2I, K], bias [2I] -> [T, I]."""
    triton = few_rows_for(x, weight, "swiglu_linear")
    if triton is not None:
        return triton.swiglu(x, weight, bias)
    return silu_and_mul(linear(x, weight, bias))


def few_rows_for(x: Tensor, weight: Tensor, name: str) -> ModuleType | None:
    """`linear_triton` where its kernel `name` should compute x [T, K] @ weight [N, K].T, else None.

    The products take half precision. The engine must have asked for the kernel, and the table
    of GPUs must say that it pays.
    """
    if triton_for(x, name) is None:
        return None
    is_half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if x.dim() != 2 or not is_half or not weight.is_contiguous():
        return None
    gpu = gpu_table.device_properties(x.device)
    if not gpu_table.few_rows_pay(gpu, len(x), len(weight)):
        return None
    return import_module("nanovllm.kernels.linear_triton")


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows ids [T] of weight [N, K] -> [T, K]."""
    if ids.is_cpu and not torch.compiler.is_compiling():
        out = cpu.embedding(ids, weight)
        if out is not None:
            return out
    return F.embedding(ids, weight)


def qk_norm_rope(qkv: Tensor, positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of each head of Q and K where the model has one, then rotary embedding.

    qkv [T, (Hq + 2 Hkv) D], positions [T] -> q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D].
    The embedding (Su et al., 2021) has the half-split form that checkpoints use. It turns
    the first R numbers of a head, where R is the width of the table of angles.
    """
    return _qk_norm_rope(qkv, positions, rope)


@compiled("qkv", "positions")
def _qk_norm_rope(qkv: Tensor, positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.view(qkv.shape[0], -1, rope.head_dim)  # [T, Hq + 2 Hkv, D]
    counts = [rope.num_heads, rope.num_kv_heads, rope.num_kv_heads]
    q, k, v = heads.split(counts, dim=1)
    if rope.q_norm is not None and rope.k_norm is not None:
        how = (rope.eps, rope.norm_offset, rope.norm_round_once)
        q = _rms_norm(q, rope.q_norm, *how)
        k = _rms_norm(k, rope.k_norm, *how)
    cos_sin = rope.cos_sin[positions.long()].to(qkv.dtype)  # [T, R]
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pair (x[i], x[i + R/2]) by the i-th angle. Numbers from R on stay.

    x [T, heads, D], cos and sin [T, 1, R/2] -> [T, heads, D].
    """
    half = cos.shape[-1]
    x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated1 = x1 * cos - x2 * sin
    rotated2 = x2 * cos + x1 * sin
    return torch.cat((rotated1, rotated2, rest), dim=-1)


def draw(logits: Tensor, temperature: Tensor, u: Tensor, threshold: Tensor | None = None) -> Tensor:
    """Draws a token of each row from softmax(logits / temperature) by inverse CDF.

    logits [R, V], temperature and u [R] -> ids [R] int64. The token is the first one in
    vocabulary order whose cumulative probability exceeds u and whose own probability is
    not 0. At temperature 0 it is the largest logit; the lowest id wins a tie. Logits
    below `threshold` [R] do not take part. NaN counts as -inf, and infinity as the
    largest finite number. A row in which nothing can be drawn gets id 0.
    """
    triton = triton_for(logits, "draw")
    if triton is not None:
        return triton.draw(logits, temperature, u, threshold)
    if threshold is not None:
        logits = logits.masked_fill(logits < threshold[:, None], float("-inf"))
    if logits.is_cpu:
        ids = cpu.draw(logits, temperature, u)
        if ids is not None:
            return ids
    greedy = temperature == 0
    logits = without_infinities(logits)
    least = torch.finfo(torch.float32).min
    top = logits.amax(-1, keepdim=True).clamp(min=least)  # [R, 1]
    divisor = temperature.masked_fill(greedy, 1)[:, None]
    weights = ((logits - top) / divisor).exp()  # [R, V]
    prob_sum = weights.cumsum(-1)
    target = u[:, None] * prob_sum[:, -1:]
    beyond = (prob_sum > target) & (weights > 0)
    return torch.where(greedy, logits.argmax(-1), beyond.int().argmax(-1))


def without_infinities(logits: Tensor) -> Tensor:
    """float32 logits in which NaN has become -inf and infinity the largest finite number."""
    return logits.float().nan_to_num(nan=float("-inf"), posinf=None, neginf=float("-inf"))


def argmax(logits: Tensor) -> Tensor:
    """[K, V] -> [K] int64: the id of the largest logit of each row. The lowest id wins a tie."""
    if logits.is_cpu:
        zeros = torch.zeros(len(logits))
        ids = cpu.draw(logits, zeros, zeros)
        if ids is not None:
            return ids
    triton = triton_for(logits, "draw")
    if triton is not None:
        zeros = torch.zeros(len(logits), device=logits.device)
        return triton.draw(logits, zeros, zeros)
    return _argmax(logits)


@compiled("logits")
def _argmax(logits: Tensor) -> Tensor:
    return without_infinities(logits).argmax(-1)
