"""The memory-bound operations between matrix products as Triton kernels, each tested against its plain PyTorch definition.

All compute in float32 and round where the definition rounds. bfloat16 is converted right after each load and right
before each store, so the kernels also run under Triton's interpreter, whose own bfloat16 arithmetic is wrong.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (kernel parameters have no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from nanovllm.kernels.rope import Rope

INTERPRETED = knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run in numpy on tensors of the CPU


def card(device: torch.device) -> tuple[tuple[int, int], int, int]:
    """Compute capability, multiprocessors, and bytes of shared memory of one; a small Hopper under the interpreter."""
    if device.type != "cuda":
        return (9, 0), 2, 228 * 1024
    card = torch.cuda.get_device_properties(device)
    # Of AMD's cards torch does not tell; an MI300 has 64 KB.
    shared_memory = getattr(card, "shared_memory_per_multiprocessor", 64 * 1024)
    return (card.major, card.minor), card.multi_processor_count, shared_memory


def registers(count: int) -> dict[str, int]:
    """The launch option that bounds a thread's registers; Triton knows it for NVIDIA's cards only."""
    return {} if torch.version.hip else {"maxnreg": count}


def power_of_2(n: int) -> int:
    """The least that is not below n. Triton's own takes a microsecond: it could also be called inside a kernel."""
    return 1 << (n - 1).bit_length()


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """What matrix products inside a kernel run in: the tensors' own type, but float32 under the interpreter."""
    return tl.float32 if INTERPRETED else getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit
def _round(x, dtype: tl.constexpr):
    """float32 rounded to what `dtype` can hold."""
    return x.to(dtype).to(tl.float32)


def _warps(block: int) -> int:
    """Warps for one row of `block` elements: 16 bytes a thread and load, no more than 16 warps."""
    return min(max(block // 512, 1), 16)


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, EPS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * H
    i = tl.arange(0, BLOCK)
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + start + i, mask=i < H, other=0.0).to(tl.float32)
    if ADD:
        x = _round(x + tl.load(residual_ptr + start + i, mask=i < H, other=0.0).to(tl.float32), dtype)
        tl.store(residual_ptr + start + i, x.to(dtype), mask=i < H)
    x = _round(x * tl.rsqrt(tl.sum(x * x) / H + EPS), dtype)
    weight = tl.load(weight_ptr + i, mask=i < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + i, (weight * x).to(dtype), mask=i < H)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension; one program a row."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    block = power_of_2(rows.shape[1])
    if len(rows):
        _rms_norm_kernel[(len(rows),)](
            rows, rows, weight, out, eps, rows.shape[1], block, False, num_warps=_warps(block)
        )
    return out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + x), residual + x), both [T, H] contiguous; overwrites both inputs with its results."""
    block = power_of_2(x.shape[1])
    if len(x):
        _rms_norm_kernel[(len(x),)](x, residual, weight, x, eps, x.shape[1], block, True, num_warps=_warps(block))
    return x, residual


@triton.jit
def _silu_and_mul_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * (2 * SIZE) + i, mask=i < SIZE, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * SIZE) + SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    dtype = x_ptr.dtype.element_ty
    tl.store(out_ptr + row * SIZE + i, (_round(gate / (1.0 + tl.exp(-gate)), dtype) * up).to(dtype), mask=i < SIZE)


def silu_and_mul(x: Tensor) -> Tensor:
    """[T, 2I] contiguous -> [T, I]: silu of the first half times the second."""
    size = x.shape[1] // 2
    out = x.new_empty(len(x), size)
    if len(x):
        _silu_and_mul_kernel[(len(x), -(-size // 1024))](x, out, size, 1024, num_warps=4)
    return out


@triton.jit
def _write_kernel(
    qkv_ptr, q_ptr, k_cache, v_cache, slots, positions, cos_sin, q_weight, k_weight,
    EPS: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, ROTATED: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, PAGE: tl.constexpr, PAGE_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One token, HEADS of its HQ + 2 HKV heads, as the two halves that the rotation pairs."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    inside = (head < HQ + 2 * HKV)[:, None] & (i < D // 2)[None, :]
    source = qkv_ptr + token * ((HQ + 2 * HKV) * D) + (head * D)[:, None] + i[None, :]
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32)
    if ROTATED > 0:
        turned = (head < ROTATED)[:, None]
        if NORM:
            scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + EPS)[:, None]
            is_q = (head < HQ)[:, None]
            q1 = tl.load(q_weight + i, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
            q2 = tl.load(q_weight + D // 2 + i, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
            k1 = tl.load(k_weight + i, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
            k2 = tl.load(k_weight + D // 2 + i, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
            x1 = tl.where(turned, x1 * scale * tl.where(is_q, q1, k1), x1)
            x2 = tl.where(turned, x2 * scale * tl.where(is_q, q2, k2), x2)
        angle = cos_sin + tl.load(positions + token).to(tl.int64) * D + i
        cos = tl.load(angle, mask=i < D // 2, other=0.0)[None, :]
        sin = tl.load(angle + D // 2, mask=i < D // 2, other=0.0)[None, :]
        x1, x2 = tl.where(turned, x1 * cos - x2 * sin, x1), tl.where(turned, x2 * cos + x1 * sin, x2)

    if HQ > 0:
        target = q_ptr + token * (HQ * D) + (head * D)[:, None] + i[None, :]
        is_q = inside & (head < HQ)[:, None]
        tl.store(target, x1.to(q_ptr.dtype.element_ty), mask=is_q)
        tl.store(target + D // 2, x2.to(q_ptr.dtype.element_ty), mask=is_q)
    slot = tl.load(slots + token).to(tl.int64)
    dtype = k_cache.dtype.element_ty
    if dtype == tl.float8e4nv:  # beyond its largest number, 448, is NaN
        x1 = tl.minimum(tl.maximum(x1, -448.0), 448.0)
        x2 = tl.minimum(tl.maximum(x2, -448.0), 448.0)
    kv_head = head - HQ
    is_v = kv_head >= HKV
    place = slot // PAGE * PAGE_STRIDE + slot % PAGE * TOKEN_STRIDE
    offset = place + ((kv_head - tl.where(is_v, HKV, 0)) * HEAD_STRIDE)[:, None] + i[None, :]
    is_k = inside & ((kv_head >= 0) & (kv_head < HKV) & (slot >= 0))[:, None]
    is_v = inside & (is_v & (slot >= 0))[:, None]
    tl.store(k_cache + offset, x1.to(dtype), mask=is_k)
    tl.store(k_cache + offset + D // 2, x2.to(dtype), mask=is_k)
    tl.store(v_cache + offset, x1.to(dtype), mask=is_v)
    tl.store(v_cache + offset + D // 2, x2.to(dtype), mask=is_v)


def write_qkv(qkv: Tensor, positions: Tensor, slots: Tensor, rope: Rope, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """QK-norm, RoPE and the K/V store in one pass over qkv [T, (Hq + 2 Hkv) D]; returns q [T, Hq, D].

    The caches are views [num_blocks, Hkv, block_size, D] of any strides but 1 in the last dimension. In bfloat16 it rounds
    once, at the end, where `kernels.qk_norm_rope` rounds after every product.
    """
    q = qkv.new_empty(len(qkv), rope.num_heads, rope.head_dim)
    rotated = rope.num_heads + rope.num_kv_heads
    q_weight = k_weight = qkv  # not read
    eps = 0.0
    if rope.q_norm is not None and rope.k_norm is not None:
        q_weight, k_weight, eps = rope.q_norm, rope.k_norm, rope.eps
    _launch_write(
        qkv, q, slots, positions, rope.cos_sin, q_weight, k_weight, eps, rope.num_heads, rotated, k_cache, v_cache
    )
    return q


def write_kv(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Stores k and v, [T, Hkv, D] each, as they are."""
    kv = torch.cat((k, v), dim=1)
    _launch_write(kv, kv, slots, slots, kv, kv, kv, 0.0, 0, 0, k_cache, v_cache)


def _launch_write(
    qkv: Tensor, q: Tensor, slots: Tensor, positions: Tensor, cos_sin: Tensor, q_weight: Tensor, k_weight: Tensor,
    eps: float, num_heads: int, rotated: int, k_cache: Tensor, v_cache: Tensor,
) -> None:  # fmt: skip
    _, num_kv_heads, page, dim = k_cache.shape
    half = power_of_2(dim // 2)
    heads = min(power_of_2(num_heads + 2 * num_kv_heads), max(2048 // half, 1))
    grid = (len(qkv), -(-(num_heads + 2 * num_kv_heads) // heads))
    if len(qkv):
        _write_kernel[grid](
            qkv, q, k_cache, v_cache, slots, positions, cos_sin, q_weight, k_weight,
            eps, num_heads, num_kv_heads, rotated, dim, half, heads, page, *k_cache.stride()[:3], eps > 0.0, num_warps=4,
        )  # fmt: skip


SAMPLE_TILE = 4096  # logits a program of the first pass reads: 38 programs a row of 152k


@triton.jit
def _tile_mass_kernel(
    logits_ptr, stride, temperature_ptr, threshold_ptr, max_ptr, mass_ptr, V,
    TILE: tl.constexpr, TILES: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """The maximum of a tile of a row and the sum of exp((x - maximum) / temperature)."""
    row = tl.program_id(0)
    x = _load_logits(logits_ptr, stride, threshold_ptr, row, tl.program_id(1), V, TILE, FILTER)
    temperature = tl.load(temperature_ptr + row)
    maximum = tl.max(x)
    # a tile without a candidate: exp(-inf - finite) = 0
    mass = tl.sum(tl.exp((x - tl.maximum(maximum, -3e38)) / tl.where(temperature > 0, temperature, 1.0)))
    tl.store(max_ptr + row * TILES + tl.program_id(1), maximum)
    tl.store(mass_ptr + row * TILES + tl.program_id(1), mass)


@triton.jit
def _beside(maximum, tile_mass, tile_max, temperature):
    """The tiles' masses relative to the largest logit of the row, no longer to that of each tile."""
    return tile_mass * tl.exp((tl.maximum(tile_max, -3e38) - maximum) / temperature)


@triton.jit
def _load_logits(logits_ptr, stride, threshold_ptr, row, tile, V, TILE: tl.constexpr, FILTER: tl.constexpr):
    i = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + i, mask=i < V, other=float("-inf")).to(tl.float32)
    if FILTER:
        x = tl.where(x >= tl.load(threshold_ptr + row), x, float("-inf"))
    return x


@triton.jit
def _draw_kernel(
    logits_ptr, stride, temperature_ptr, u_ptr, threshold_ptr, max_ptr, mass_ptr, token_ptr, V, num_tiles,
    TILE: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """Finds the tile in which a row's cumulative mass passes u, reads it again and finds the token in it."""
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    tile_index = tl.arange(0, PADDED)
    tile_max = tl.load(max_ptr + row * TILES + tile_index, mask=tile_index < num_tiles, other=float("-inf"))
    tile_mass = tl.load(mass_ptr + row * TILES + tile_index, mask=tile_index < num_tiles, other=0.0)
    maximum = tl.max(tile_max)
    if temperature > 0:
        mass = _beside(maximum, tile_mass, tile_max, temperature)
        end = tl.cumsum(mass)
        target = tl.load(u_ptr + row) * tl.sum(mass)
        # Rounding may leave the target a hair beyond the last sum: then it is the last tile, the last token, with mass.
        tile = tl.min(tl.where((end > target) & (mass > 0), tile_index, PADDED))
        tile = tl.where(tile < PADDED, tile, tl.max(tl.where(mass > 0, tile_index, 0)))
        target -= tl.sum(tl.where(tile_index < tile, mass, 0.0))
        x = _load_logits(logits_ptr, stride, threshold_ptr, row, tile, V, TILE, FILTER)
        p = tl.exp((x - maximum) / temperature)
        i = tl.arange(0, TILE)
        at = tl.min(tl.where((tl.cumsum(p) > target) & (p > 0), i, TILE))
        at = tl.where(at < TILE, at, tl.max(tl.where(p > 0, i, 0)))
    else:
        tile = tl.min(tl.where(tile_max == maximum, tile_index, PADDED - 1))
        x = _load_logits(logits_ptr, stride, threshold_ptr, row, tile, V, TILE, FILTER)
        at = tl.min(tl.where(x == maximum, tl.arange(0, TILE), TILE - 1))
    tl.store(token_ptr + row, tl.minimum(tile * TILE + at, V - 1).to(tl.int64))  # no other id, whatever NaN does


def draw(logits: Tensor, temperature: Tensor, u: Tensor, threshold: Tensor | None = None) -> Tensor:
    """One token a row by inverse CDF: logits [K, V] of any float type -> ids [K] int64, on two reads of a row at most.

    The token is the first in vocabulary order at which the cumulative softmax(logits / temperature) exceeds u [K] in
    [0, 1); at temperature 0 it is the first of the largest logits. Logits below `threshold` [K] do not take part.
    """
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        maxima, masses = _tile_masses(logits, temperature, threshold, SAMPLE_TILE)
        num_tiles = maxima.shape[1]
        _draw_kernel[(rows,)](
            logits, logits.stride(0), temperature, u, temperature if threshold is None else threshold, maxima, masses,
            tokens, vocab_size, num_tiles,
            SAMPLE_TILE, num_tiles, power_of_2(num_tiles), threshold is not None, num_warps=8,
        )  # fmt: skip
    return tokens


def _tile_masses(logits: Tensor, temperature: Tensor, threshold: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
    """The maximum of each tile of each row [K, tiles], and the sum of exp((x - maximum) / temperature) over it."""
    rows, vocab_size = logits.shape
    num_tiles = -(-vocab_size // tile)
    # Not halves of one tensor: the second would be aligned for some numbers of rows only, and kernels be compiled twice.
    maxima, masses = (torch.empty(rows, num_tiles, dtype=torch.float32, device=logits.device) for _ in range(2))
    _tile_mass_kernel[(rows, num_tiles)](
        logits, logits.stride(0), temperature, temperature if threshold is None else threshold, maxima, masses,
        vocab_size, tile, num_tiles, threshold is not None, num_warps=max(tile // 512, 1),
    )  # fmt: skip
    return maxima, masses


# Filters. min-p, top-k and top-p all keep "the logits of at least t", so a row's filter is one number and needs no sort:
# t is searched for over the bit patterns of floats, which sort like the numbers, reading once a step those tiles of the
# row that have a logit in the interval.

FILTER_TILE = 1024


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """float32 -> integer of the same order; the SHIFT low bits, which the logits' own type does not have, are left out."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The least float32 of that key."""
    bits = (key << SHIFT).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _search(
    row_ptr, max_ptr, V, floor, bound, need, maximum, temperature,
    MASS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The largest t >= floor such that the logits >= t reach `need`, in number or in mass; `floor` if none does.

    Where one does, it is known to be at least `bound`. Each read tries WAYS points and keeps the interval low <= t < high
    between two of them. It ends when no two logits are left in the interval to be told apart.
    """
    WAYS: tl.constexpr = 4
    way = tl.arange(0, WAYS)
    low = _key(tl.maximum(floor, bound), SHIFT)
    high = _key(maximum, SHIFT) + 1
    above = 0  # logits >= high
    left = V  # logits in low:high
    while (high - low > 1) & (left > 1):
        step = tl.maximum((high - low) // WAYS, 1)
        point = _value(low + way * step, SHIFT)
        point = tl.where(point > floor, point, floor)[:, None]  # a key of -inf may give the bits of a NaN
        count = tl.zeros([WAYS, TILE], tl.int32)
        mass = tl.zeros([WAYS, TILE], tl.float32)
        least = tl.min(point)
        for tile in range(TILES):
            if tl.load(max_ptr + tile) >= least:
                i = tile * TILE + tl.arange(0, TILE)
                x = tl.load(row_ptr + i, mask=i < V, other=float("-inf")).to(tl.float32)[None, :]
                taken = (x >= point) & (i < V)[None, :]
                count += taken.to(tl.int32)
                if MASS:
                    mass += tl.where(taken, tl.exp((x - maximum) / temperature), 0.0)
        counts = tl.sum(count, 1)
        enough = tl.sum(mass, 1) >= need if MASS else counts >= need
        best = tl.max(tl.where(enough, way, 0))
        above = tl.where(best + 1 < WAYS, tl.sum(tl.where(way == best + 1, counts, 0)), above)
        left = tl.sum(tl.where(way == best, counts, 0)) - above
        high = tl.where(best + 1 < WAYS, tl.minimum(high, low + (best + 1) * step), high)
        low += best * step
    value = _value(low, SHIFT)
    return tl.where(value > floor, value, floor)


@triton.jit
def _threshold_kernel(
    logits_ptr, stride, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, max_ptr, mass_ptr, threshold_ptr, V,
    TILE: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    max_ptr += row * TILES
    mass_ptr += row * TILES
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)

    tile_index = tl.arange(0, PADDED)
    tile_max = tl.load(max_ptr + tile_index, mask=tile_index < TILES, other=float("-inf"))
    maximum = tl.max(tile_max)
    floor = maximum + temperature * tl.log(tl.load(min_p_ptr + row))
    if (top_k > 0) & (top_k < V):
        # The k largest of the tiles' maxima are k logits: the k-th largest logit is no less than the least of them.
        kth = tl.sum(tl.where(tile_index == top_k - 1, tl.sort(tile_max, descending=True), 0.0))
        kth = tl.where(top_k <= TILES, kth, float("-inf"))
        floor = _search(row_ptr, max_ptr, V, floor, kth, top_k, maximum, temperature, False, TILE, TILES, SHIFT)
    if top_p < 1:
        if floor > float("-inf"):
            mass = tl.zeros([TILE], tl.float32)
            for tile in range(TILES):
                if tl.load(max_ptr + tile) >= floor:
                    i = tile * TILE + tl.arange(0, TILE)
                    x = tl.load(row_ptr + i, mask=i < V, other=float("-inf")).to(tl.float32)
                    mass += tl.where(x >= floor, tl.exp((x - maximum) / temperature), 0.0)
            total = tl.sum(mass)
        else:
            tile_mass = tl.load(mass_ptr + tile_index, mask=tile_index < TILES, other=0.0)
            total = tl.sum(_beside(maximum, tile_mass, tile_max, temperature))
        need = tl.maximum(top_p, 1e-30) * total  # the largest logit always stays
        # All logits below this have together less mass, e^-17, than float32 can tell from 0 beside the largest one's, 1.
        bound = maximum - temperature * (tl.log(V.to(tl.float32)) + 17.0)
        floor = _search(row_ptr, max_ptr, V, floor, bound, need, maximum, temperature, True, TILE, TILES, SHIFT)
    tl.store(threshold_ptr + row, floor)


def filter_threshold(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[K] float32: the least logit of logits [K, V] that min-p, top-k and top-p, in this order, leave in a row.

    min-p keeps p >= min_p * max(p); top-k the k largest (k of 0 or less, or of V and more: all); top-p the smallest set
    whose share of what the other two left reaches top_p. Ties with the last one kept are kept. temperature [K] > 0.
    """
    shift = {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0)
    threshold = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        maxima, masses = _tile_masses(logits, temperature, None, FILTER_TILE)
        num_tiles = maxima.shape[1]
        _threshold_kernel[(len(logits),)](
            logits, logits.stride(0), temperature, top_k, top_p, min_p, maxima, masses, threshold, logits.shape[1],
            FILTER_TILE, num_tiles, max(power_of_2(num_tiles), 2), shift, num_warps=4, **registers(160),
        )  # fmt: skip
    return threshold
