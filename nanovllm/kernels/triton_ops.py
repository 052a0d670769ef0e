"""The memory-bound operations between matrix products as Triton kernels.

Each kernel is tested against its plain PyTorch definition. It computes in float32 and
rounds where the definition rounds. It converts bfloat16 right after each load and right
before each store, because the bfloat16 arithmetic of Triton's interpreter is wrong.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (kernel parameters have no Python types)
from __future__ import annotations

from dataclasses import dataclass
from inspect import signature

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from nanovllm.core.batch import ceil_div
from nanovllm.kernels import gpu_table
from nanovllm.kernels.choice import has_kernel
from nanovllm.kernels.gpu_table import power_of_2, registers
from nanovllm.kernels.rope import Rope

# With TRITON_INTERPRET=1 kernels run in numpy, on tensors of the CPU.
INTERPRETED = knobs.runtime.interpret


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """The type of matrix products inside a kernel: `dtype`, but float32 under the interpreter."""
    return tl.float32 if INTERPRETED else getattr(tl, str(dtype).removeprefix("torch."))


# Programmatic dependent launch (PDL): the GPU starts the programs of a kernel while the kernel
# before it still runs. A kernel with PDL must `wait` before its first access to memory.


def compiles_pdl() -> bool:
    """Whether Triton can compile `wait`. The compiler of 3.4 cannot call its own gdc_wait."""
    if INTERPRETED:
        return False
    cuda = getattr(tl.extra, "cuda", None)
    gdc_wait = getattr(cuda, "gdc_wait", None)
    return gdc_wait is not None and "_semantic" in signature(gdc_wait).parameters


COMPILES_PDL = compiles_pdl()


def pdl(device: torch.device) -> dict[str, bool]:
    """Launch options: PDL where the engine chose it, and the GPU and Triton have it."""
    if COMPILES_PDL and has_kernel("pdl") and gpu_table.device_properties(device).kind.has_pdl:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def wait(PDL: tl.constexpr):
    """Waits until all kernels before this one have ended and their stores are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def launch_next(PDL: tl.constexpr):
    """Lets the GPU start the next kernel, which waits for the end of this one by itself."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _round(x, dtype: tl.constexpr):
    """float32 rounded to the precision of `dtype`."""
    return x.to(dtype).to(tl.float32)


def _warps(block: int) -> int:
    """Warps for one row of `block` elements: 16 bytes a thread and load, at most 16 warps."""
    return min(max(block // 512, 1), 16)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    EPS: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of H elements, padded to BLOCK. ADD: adds the residual first and stores the sum.

    OFFSET is added to the weights. ROUND_ONCE: see `kernels.rms_norm`.
    """
    wait(PDL)
    start = tl.program_id(0).to(tl.int64) * H
    i = tl.arange(0, BLOCK)
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + start + i, mask=i < H, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + start + i, mask=i < H, other=0.0).to(tl.float32)
        x = _round(x + residual, dtype)
        tl.store(residual_ptr + start + i, x.to(dtype), mask=i < H)
    x = x * tl.rsqrt(tl.sum(x * x) / H + EPS)
    if not ROUND_ONCE:
        x = _round(x, dtype)
    weight = _plus(tl.load(weight_ptr + i, mask=i < H, other=0.0).to(tl.float32), OFFSET)
    launch_next(PDL)
    tl.store(out_ptr + start + i, (weight * x).to(dtype), mask=i < H)


@triton.jit
def _plus(weight, OFFSET: tl.constexpr):
    """weight + OFFSET. An offset of 0 adds no instruction."""
    if OFFSET != 0.0:
        weight += OFFSET
    return weight


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, round_once: bool = False
) -> Tensor:
    """(weight + offset) * x / sqrt(mean(x^2) + eps) over the last dimension.

    One program computes a row.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    block = power_of_2(rows.shape[1])
    if len(rows):
        _rms_norm_kernel[(len(rows),)](
            rows, rows, weight, out, eps, rows.shape[1], block, False, offset, round_once,
            num_warps=_warps(block), **pdl(x.device),
        )  # fmt: skip
    return out.view(x.shape)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    round_once: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + x), residual + x), both [T, H] contiguous. Overwrites both inputs."""
    block = power_of_2(x.shape[1])
    if len(x):
        _rms_norm_kernel[(len(x),)](
            x, residual, weight, x, eps, x.shape[1], block, True, offset, round_once,
            num_warps=_warps(block), **pdl(x.device),
        )  # fmt: skip
    return x, residual


@triton.jit
def _activation_and_mul_kernel(
    x_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK of the SIZE outputs of one row.

    silu(g) = g * sigmoid(g). gelu(g) = g * sigmoid(2 u) with u = sqrt(2 / pi) (g + 0.044715
    g^3), because (1 + tanh(u)) / 2 = sigmoid(2 u).
    """
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * (2 * SIZE) + i, mask=i < SIZE, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * SIZE) + SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    launch_next(PDL)
    dtype = x_ptr.dtype.element_ty
    z = gate
    if GELU:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    activated = _round(gate / (1.0 + tl.exp(-z)), dtype)
    tl.store(out_ptr + row * SIZE + i, (activated * up).to(dtype), mask=i < SIZE)


def silu_and_mul(x: Tensor) -> Tensor:
    """[T, 2I] contiguous -> [T, I]: silu of the first half times the second."""
    return _activation_and_mul(x, gelu=False)


def gelu_and_mul(x: Tensor) -> Tensor:
    """[T, 2I] contiguous -> [T, I]: gelu (its tanh formula) of the first half times the second."""
    return _activation_and_mul(x, gelu=True)


def _activation_and_mul(x: Tensor, gelu: bool) -> Tensor:
    size = x.shape[1] // 2
    out = x.new_empty(len(x), size)
    if len(x):
        grid = (len(x), ceil_div(size, 1024))
        _activation_and_mul_kernel[grid](x, out, size, 1024, gelu, num_warps=4, **pdl(x.device))
    return out


@triton.jit
def _write_kernel(
    qkv_ptr, q_ptr, k_cache, v_cache, slots, positions, cos_sin, q_weight, k_weight,
    EPS: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
    ROTATED: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr, PAGE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token, HEADS of its HQ + HK + HV heads of D numbers.

    A head is loaded as the two halves that the rotation pairs, of HALF numbers each, and
    the REST that it does not turn. HALF_BLOCK is HALF padded to a power of two. The first
    ROTATED heads are rotated. NORM: they are normalised before; OFFSET is added to the
    weights of this norm.
    """
    REST: tl.constexpr = D - 2 * HALF
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF_BLOCK)
    exists = (head < HQ + HK + HV)[:, None]
    inside = exists & (i < HALF)[None, :]
    start = qkv_ptr + token * ((HQ + HK + HV) * D) + (head * D)[:, None]
    source = start + i[None, :]
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    x3 = x1  # not read where REST is 0
    if REST > 0:
        j = tl.arange(0, triton.next_power_of_2(REST))
        source = start + j[None, :] + 2 * HALF
        x3 = tl.load(source, mask=exists & (j < REST)[None, :], other=0.0).to(tl.float32)
    if ROTATED > 0:
        is_rotated = (head < ROTATED)[:, None]
        if NORM:
            is_q = (head < HQ)[:, None]
            squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
            if REST > 0:
                squares += tl.sum(x3 * x3, 1)
            scale = tl.rsqrt(squares / D + EPS)[:, None]
            weight1 = _norm_weight(q_weight, k_weight, is_q, i, HALF, OFFSET)
            weight2 = _norm_weight(q_weight + HALF, k_weight + HALF, is_q, i, HALF, OFFSET)
            x1 = tl.where(is_rotated, x1 * scale * weight1, x1)
            x2 = tl.where(is_rotated, x2 * scale * weight2, x2)
            if REST > 0:
                at = 2 * HALF
                weight3 = _norm_weight(q_weight + at, k_weight + at, is_q, j, REST, OFFSET)
                x3 = tl.where(is_rotated, x3 * scale * weight3, x3)
        angle = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * HALF) + i
        cos = tl.load(angle, mask=i < HALF, other=0.0)[None, :]
        sin = tl.load(angle + HALF, mask=i < HALF, other=0.0)[None, :]
        rotated1 = tl.where(is_rotated, x1 * cos - x2 * sin, x1)
        rotated2 = tl.where(is_rotated, x2 * cos + x1 * sin, x2)
        x1 = rotated1
        x2 = rotated2

    if HQ > 0:
        is_q = (head < HQ)[:, None]
        _store_heads(q_ptr + token * (HQ * D), (head * D)[:, None], x1, x2, x3, is_q, HALF, REST)
    slot = tl.load(slots + token).to(tl.int64)
    launch_next(PDL)
    if k_cache.dtype.element_ty == tl.float8e4nv:
        x1 = _clamped(x1)
        x2 = _clamped(x2)
        x3 = _clamped(x3)
    kv_head = head - HQ
    is_v = kv_head >= HK
    place = slot // PAGE * PAGE_STRIDE + slot % PAGE * TOKEN_STRIDE
    offset = place + ((kv_head - tl.where(is_v, HK, 0)) * HEAD_STRIDE)[:, None]
    is_k = ((kv_head >= 0) & (kv_head < HK) & (slot >= 0))[:, None]
    is_v = (is_v & (slot >= 0))[:, None] & exists
    _store_heads(k_cache, offset, x1, x2, x3, is_k, HALF, REST)
    if HV > 0:
        _store_heads(v_cache, offset, x1, x2, x3, is_v, HALF, REST)


@triton.jit
def _norm_weight(q_weight, k_weight, is_q, i, SIZE: tl.constexpr, OFFSET: tl.constexpr):
    """Factors i < SIZE of the norm of Q where is_q [heads, 1], else of K: [heads, len(i)]."""
    q = tl.load(q_weight + i, mask=i < SIZE, other=0.0).to(tl.float32)[None, :]
    k = tl.load(k_weight + i, mask=i < SIZE, other=0.0).to(tl.float32)[None, :]
    return _plus(tl.where(is_q, q, k), OFFSET)


@triton.jit
def _clamped(x):
    """x within the range of float8 e4m3, because larger numbers would become NaN."""
    return tl.minimum(tl.maximum(x, -448.0), 448.0)


@triton.jit
def _store_heads(base, offset, x1, x2, x3, mask, HALF: tl.constexpr, REST: tl.constexpr):
    """Stores the parts of heads that begin at base + offset [heads, 1].

    mask [heads, 1]: which heads.
    """
    dtype = base.dtype.element_ty
    i = tl.arange(0, x1.shape[1])[None, :]
    inside = mask & (i < HALF)
    target = base + (offset + i)
    tl.store(target, x1.to(dtype), mask=inside)
    tl.store(target + HALF, x2.to(dtype), mask=inside)
    if REST > 0:
        j = tl.arange(0, x3.shape[1])[None, :]
        target = base + (offset + j + 2 * HALF)
        tl.store(target, x3.to(dtype), mask=mask & (j < REST))


@dataclass(frozen=True)
class _Heads:
    """What `_write_kernel` does with the heads of a token.

    The first `rotated` heads, of Q and K, are rotated, after a norm where `norm` is true.
    """

    q: int
    k: int
    v: int
    rotated: int = 0
    rotary_dim: int = 0  # numbers of a head that the rotation turns; 0: all
    norm: bool = False
    eps: float = 0.0
    norm_offset: float = 0.0


def write_qkv(
    qkv: Tensor, positions: Tensor, slots: Tensor, rope: Rope, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """QK-norm, RoPE and the K/V store in one pass.

    qkv [T, (Hq + 2 Hkv) D] -> q [T, Hq, D]. The caches are views [num_blocks, Hkv,
    block_size, D] whose last dimension has stride 1. In bfloat16 this rounds once, at the
    end. `kernels.qk_norm_rope` rounds after every product.
    """
    q = qkv.new_empty(len(qkv), rope.num_heads, rope.head_dim)
    rotated = rope.num_heads + rope.num_kv_heads
    q_weight = k_weight = qkv  # not read
    norm = rope.q_norm is not None and rope.k_norm is not None
    if rope.q_norm is not None and rope.k_norm is not None:
        q_weight = rope.q_norm
        k_weight = rope.k_norm
    heads = _Heads(
        q=rope.num_heads,
        k=rope.num_kv_heads,
        v=rope.num_kv_heads,
        rotated=rotated,
        rotary_dim=rope.cos_sin.shape[1],
        norm=norm,
        eps=rope.eps,
        norm_offset=rope.norm_offset,
    )
    _launch_write(
        qkv, q, slots, positions, rope.cos_sin, q_weight, k_weight, heads, k_cache, v_cache
    )
    return q


def write_kv(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Stores k [T, Hkv, D] and v [T, Hkv, Dv] without norm or rotation."""
    count = k.shape[1]
    if k.shape == v.shape:
        kv = torch.cat((k, v), dim=1)
        heads = _Heads(q=0, k=count, v=count)
        _launch_write(kv, kv, slots, slots, kv, kv, kv, heads, k_cache, v_cache)
        return
    heads = _Heads(q=0, k=count, v=0)
    for x, pages in ((k.contiguous(), k_cache), (v.contiguous(), v_cache)):
        _launch_write(x, x, slots, slots, x, x, x, heads, pages, pages)


def _launch_write(
    qkv: Tensor, q: Tensor, slots: Tensor, positions: Tensor, cos_sin: Tensor, q_weight: Tensor,
    k_weight: Tensor, heads: _Heads, k_cache: Tensor, v_cache: Tensor,
) -> None:  # fmt: skip
    """Launches `_write_kernel`."""
    _, _, page, dim = k_cache.shape
    half = (heads.rotary_dim or dim) // 2
    half_block = power_of_2(half)
    count = heads.q + heads.k + heads.v
    block = min(power_of_2(count), max(2048 // power_of_2(dim // 2), 1))
    grid = (len(qkv), ceil_div(count, block))
    if len(qkv):
        _write_kernel[grid](
            qkv, q, k_cache, v_cache, slots, positions, cos_sin, q_weight, k_weight,
            heads.eps, heads.q, heads.k, heads.v, heads.rotated, dim, half, half_block, block,
            page, *k_cache.stride()[:3], heads.norm, heads.norm_offset, num_warps=4,
            **pdl(qkv.device),
        )  # fmt: skip


SAMPLE_TILE = 4096  # logits that a program of the first pass reads


@triton.jit
def _tile_sum_kernel(
    logits_ptr, stride, temperature_ptr, threshold_ptr, max_ptr, sum_ptr, V,
    TILE: tl.constexpr, TILES: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """The maximum of a tile of a row and the sum of exp((x - maximum) / temperature)."""
    _sum_tile(
        logits_ptr, stride, temperature_ptr, threshold_ptr, max_ptr, sum_ptr, tl.program_id(1), V,
        TILE, TILES, FILTER,
    )  # fmt: skip


@triton.jit
def _filter_tile_sum_kernel(
    logits_ptr, stride, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, max_ptr, sum_ptr, V,
    TILE: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`_tile_sum_kernel` for the rows that a filter limits. Other rows are not read.

    A program has GROUP tiles, so that few programs start in vain for other rows.
    """
    row = tl.program_id(0)
    if _all_off(row, top_k_ptr, top_p_ptr, min_p_ptr, V):
        return
    for i in tl.static_range(GROUP):
        tile = tl.program_id(1) * GROUP + i
        _sum_tile(
            logits_ptr, stride, temperature_ptr, temperature_ptr, max_ptr, sum_ptr, tile, V,
            TILE, TILES, False,
        )  # fmt: skip


@triton.jit
def _all_off(row, top_k_ptr, top_p_ptr, min_p_ptr, V):
    """Whether no filter limits the row."""
    top_k = tl.load(top_k_ptr + row)
    is_off = (top_k <= 0) | (top_k >= V)
    return is_off & (tl.load(top_p_ptr + row) >= 1.0) & (tl.load(min_p_ptr + row) <= 0.0)


@triton.jit
def _sum_tile(
    logits_ptr, stride, temperature_ptr, threshold_ptr, max_ptr, sum_ptr, tile, V,
    TILE: tl.constexpr, TILES: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """The work of `_tile_sum_kernel` on one tile. A tile beyond the row stores nothing."""
    row = tl.program_id(0)
    x = _load_logits(logits_ptr, stride, threshold_ptr, row, tile, V, TILE, FILTER)
    temperature = tl.load(temperature_ptr + row)
    maximum = tl.max(x)
    # The bound is for a tile without a candidate, because exp(-inf - finite) is 0.
    distance = x - tl.maximum(maximum, -3e38)
    prob_sum = tl.sum(tl.exp(distance / tl.where(temperature > 0, temperature, 1.0)))
    tl.store(max_ptr + row * TILES + tile, maximum, mask=tile < TILES)
    tl.store(sum_ptr + row * TILES + tile, prob_sum, mask=tile < TILES)


@triton.jit
def _rescaled(maximum, tile_sum, tile_max, temperature):
    """The tiles' sums relative to the largest logit of the row, not to that of each tile."""
    return tile_sum * tl.exp((tl.maximum(tile_max, -3e38) - maximum) / temperature)


@triton.jit
def _without_infinities(x):
    """float32 logits: NaN counts as -inf, and infinity as the largest finite number."""
    x = x.to(tl.float32)
    return tl.where(x == x, tl.minimum(x, 3.4028234e38), float("-inf"))


@triton.jit
def _load_logits(
    logits_ptr, stride, threshold_ptr, row, tile, V, TILE: tl.constexpr, FILTER: tl.constexpr
):
    """A tile of a row, [TILE] float32. Logits below the threshold and padding are -inf."""
    i = tile * TILE + tl.arange(0, TILE)
    address = logits_ptr + row.to(tl.int64) * stride + i
    x = _without_infinities(tl.load(address, mask=i < V, other=float("-inf")))
    if FILTER:
        x = tl.where(x >= tl.load(threshold_ptr + row), x, float("-inf"))
    return x


@triton.jit
def _draw_kernel(
    logits_ptr, stride, temperature_ptr, u_ptr, threshold_ptr, max_ptr, sum_ptr, token_ptr,
    V, num_tiles,
    TILE: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """Finds the tile in which a row's cumulative probability passes u, then the token in it."""
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    tile_index = tl.arange(0, PADDED)
    is_tile = tile_index < num_tiles
    tile_max = tl.load(max_ptr + row * TILES + tile_index, mask=is_tile, other=float("-inf"))
    tile_sum = tl.load(sum_ptr + row * TILES + tile_index, mask=is_tile, other=0.0)
    maximum = tl.max(tile_max)
    if temperature > 0:
        prob_sum = _rescaled(maximum, tile_sum, tile_max, temperature)
        end = tl.cumsum(prob_sum)
        target = tl.load(u_ptr + row) * tl.sum(prob_sum)
        # Rounding may leave the target slightly above the last sum. Then the drawn token
        # is the last one whose probability is not 0, in the last such tile.
        tile = tl.min(tl.where((end > target) & (prob_sum > 0), tile_index, PADDED))
        tile = tl.where(tile < PADDED, tile, tl.max(tl.where(prob_sum > 0, tile_index, 0)))
        target -= tl.sum(tl.where(tile_index < tile, prob_sum, 0.0))
        x = _load_logits(logits_ptr, stride, threshold_ptr, row, tile, V, TILE, FILTER)
        p = tl.exp((x - maximum) / temperature)
        i = tl.arange(0, TILE)
        at = tl.min(tl.where((tl.cumsum(p) > target) & (p > 0), i, TILE))
        at = tl.where(at < TILE, at, tl.max(tl.where(p > 0, i, 0)))
    else:
        tile = tl.min(tl.where(tile_max == maximum, tile_index, PADDED - 1))
        x = _load_logits(logits_ptr, stride, threshold_ptr, row, tile, V, TILE, FILTER)
        at = tl.min(tl.where(x == maximum, tl.arange(0, TILE), TILE - 1))
    # The bound keeps the id inside the vocabulary, whatever NaN does.
    token = tl.minimum(tile * TILE + at, V - 1)
    tl.store(token_ptr + row, token.to(tl.int64))


def draw(logits: Tensor, temperature: Tensor, u: Tensor, threshold: Tensor | None = None) -> Tensor:
    """One token a row by inverse CDF: logits [K, V] of any float type -> ids [K] int64.

    The token is the first in vocabulary order at which the cumulative softmax(logits /
    temperature) exceeds u [K] in [0, 1). At temperature 0 it is the largest logit; the
    lowest id wins a tie. Logits below `threshold` [K] do not take part. A logit is read
    at most twice.
    """
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        maxima, prob_sums = _tile_buffers(logits, SAMPLE_TILE)
        num_tiles = maxima.shape[1]
        _tile_sum_kernel[(rows, num_tiles)](
            logits, logits.stride(0), temperature,
            temperature if threshold is None else threshold, maxima, prob_sums,
            vocab_size, SAMPLE_TILE, num_tiles, threshold is not None, num_warps=8,
        )  # fmt: skip
        _draw_kernel[(rows,)](
            logits, logits.stride(0), temperature, u,
            temperature if threshold is None else threshold, maxima, prob_sums, tokens,
            vocab_size, num_tiles,
            SAMPLE_TILE, num_tiles, power_of_2(num_tiles), threshold is not None, num_warps=8,
        )  # fmt: skip
    return tokens


def _tile_buffers(logits: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """For the maximum of each tile of each row, and for the sum of its probabilities.

    A probability is exp((x - maximum) / temperature). Both buffers are float32 [K, tiles].
    """
    rows, vocab_size = logits.shape
    num_tiles = ceil_div(vocab_size, tile)
    # Two tensors, not halves of one, because a half is aligned for some numbers of rows
    # only. Triton would compile its kernels twice.
    maxima = torch.empty(rows, num_tiles, dtype=torch.float32, device=logits.device)
    return maxima, torch.empty_like(maxima)


# Filters. min-p, top-k and top-p all keep the logits that are at least some t. So the
# filter of a row is one number t, and it needs no sort. `_search` looks for t over the
# bit patterns of floats, because these sort like the numbers. A step of the search reads
# only tiles that have a logit in the interval.

FILTER_TILE = 1024
FILTER_GROUP = 4  # tiles that a program of the first pass reads


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """float32 -> integer of the same order, without the SHIFT low bits.

    The logits' own type does not have these bits.
    """
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The least float32 whose `_key` is `key`."""
    bits = (key << SHIFT).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _search(
    row_ptr, max_ptr, V, floor, bound, need, maximum, temperature,
    BY_PROB: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The largest t >= floor such that the logits >= t reach `need`; else `floor`.

    They reach it in number, or with BY_PROB in probability. If a t exists, the caller
    knows that it is at least `bound`. Each read tries WAYS points and keeps the interval
    low <= t < high between two of them. The search ends when the interval has no two
    logits of different keys.
    """
    WAYS: tl.constexpr = 4
    way = tl.arange(0, WAYS)
    low = _key(tl.maximum(floor, bound), SHIFT)
    high = _key(maximum, SHIFT) + 1
    above = 0  # number of logits >= high
    left = V  # number of logits in low:high
    while (high - low > 1) & (left > 1):
        step = tl.maximum((high - low) // WAYS, 1)
        point = _value(low + way * step, SHIFT)
        # Written as a comparison, because a key of -inf may give the bits of a NaN.
        point = tl.where(point > floor, point, floor)[:, None]
        count = tl.zeros([WAYS, TILE], tl.int32)
        prob_sum = tl.zeros([WAYS, TILE], tl.float32)
        least = tl.min(point)
        for tile in range(TILES):
            if tl.load(max_ptr + tile) >= least:
                i = tile * TILE + tl.arange(0, TILE)
                x = tl.load(row_ptr + i, mask=i < V, other=float("-inf"))
                x = _without_infinities(x)[None, :]
                taken = (x >= point) & (i < V)[None, :]
                count += taken.to(tl.int32)
                if BY_PROB:
                    prob_sum += tl.where(taken, tl.exp((x - maximum) / temperature), 0.0)
        counts = tl.sum(count, 1)
        enough = tl.sum(prob_sum, 1) >= need if BY_PROB else counts >= need
        best = tl.max(tl.where(enough, way, 0))
        above = tl.where(best + 1 < WAYS, tl.sum(tl.where(way == best + 1, counts, 0)), above)
        left = tl.sum(tl.where(way == best, counts, 0)) - above
        high = tl.where(best + 1 < WAYS, tl.minimum(high, low + (best + 1) * step), high)
        low += best * step
    value = _value(low, SHIFT)
    return tl.where(value > floor, value, floor)


@triton.jit
def _threshold_kernel(
    logits_ptr, stride, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, max_ptr, sum_ptr,
    threshold_ptr, V,
    TILE: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The least logit of one row that min-p, top-k and top-p leave."""
    row = tl.program_id(0)
    if _all_off(row, top_k_ptr, top_p_ptr, min_p_ptr, V):
        tl.store(threshold_ptr + row, float("-inf"))
        return
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    max_ptr += row * TILES
    sum_ptr += row * TILES
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)

    tile_index = tl.arange(0, PADDED)
    tile_max = tl.load(max_ptr + tile_index, mask=tile_index < TILES, other=float("-inf"))
    maximum = tl.max(tile_max)
    floor = maximum + temperature * tl.log(tl.load(min_p_ptr + row))
    if (top_k > 0) & (top_k < V):
        # The k largest of the tiles' maxima are k logits. So the k-th largest logit is
        # not below the least of these k.
        kth = tl.sum(tl.where(tile_index == top_k - 1, tl.sort(tile_max, descending=True), 0.0))
        kth = tl.where(top_k <= TILES, kth, float("-inf"))
        floor = _search(
            row_ptr, max_ptr, V, floor, kth, top_k, maximum, temperature, False, TILE, TILES, SHIFT
        )
    if top_p < 1:
        if floor > float("-inf"):
            prob_sum = tl.zeros([TILE], tl.float32)
            for tile in range(TILES):
                if tl.load(max_ptr + tile) >= floor:
                    i = tile * TILE + tl.arange(0, TILE)
                    x = _without_infinities(tl.load(row_ptr + i, mask=i < V, other=float("-inf")))
                    prob_sum += tl.where(x >= floor, tl.exp((x - maximum) / temperature), 0.0)
            total = tl.sum(prob_sum)
        else:
            tile_sum = tl.load(sum_ptr + tile_index, mask=tile_index < TILES, other=0.0)
            total = tl.sum(_rescaled(maximum, tile_sum, tile_max, temperature))
        need = tl.maximum(top_p, 1e-30) * total  # the largest logit always stays
        # Logits below the bound have together at most the weight e^-17. The largest logit
        # has the weight 1, and float32 cannot add e^-17 to 1.
        bound = maximum - temperature * (tl.log(V.to(tl.float32)) + 17.0)
        floor = _search(
            row_ptr, max_ptr, V, floor, bound, need, maximum, temperature, True, TILE, TILES, SHIFT
        )
    tl.store(threshold_ptr + row, floor)


def filter_threshold(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The least logit that min-p, top-k and top-p leave in a row: [K, V] -> [K] float32.

    They apply in this order. min-p keeps p >= min_p * max(p). top-k keeps the k largest;
    k of at most 0 or at least V keeps all. top-p keeps the smallest set whose share of
    the rest reaches top_p. Ties with the last token kept are kept. A row without a filter
    gets -inf, and its logits are not read. temperature [K] is above 0 in other rows.
    """
    shift = {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0)
    threshold = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        maxima, prob_sums = _tile_buffers(logits, FILTER_TILE)
        num_tiles = maxima.shape[1]
        _filter_tile_sum_kernel[(len(logits), ceil_div(num_tiles, FILTER_GROUP))](
            logits, logits.stride(0), temperature, top_k, top_p, min_p, maxima, prob_sums,
            logits.shape[1], FILTER_TILE, num_tiles, FILTER_GROUP, num_warps=4,
        )  # fmt: skip
        _threshold_kernel[(len(logits),)](
            logits, logits.stride(0), temperature, top_k, top_p, min_p, maxima, prob_sums,
            threshold, logits.shape[1],
            FILTER_TILE, num_tiles, max(power_of_2(num_tiles), 2), shift,
            num_warps=4, **registers(160),
        )  # fmt: skip
    return threshold
