"""Paged attention for any GPU as two Triton kernels: FlashAttention and split-KV
decoding.

Both fold key tiles into a running softmax (`_fold_tiles`). They differ in how programs
share the work. Nothing here reads a device tensor on the host, so a CUDA graph can
capture a step, `begin` included.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (kernel parameters have no Python types)
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm import kernels
from nanovllm.attention.base import AttentionBackend, AttentionSpec, zeroed_pages
from nanovllm.cache.spec import PagedKV
from nanovllm.core.batch import AttentionMetadata, ceil_div
from nanovllm.kernels import gpu_table
from nanovllm.kernels.gpu_table import (
    OLDEST,
    DeviceProperties,
    Shape,
    decode_programs,
    decode_shape,
    power_of_2,
    prefill_shape,
)
from nanovllm.kernels.rope import Rope
from nanovllm.kernels.triton_ops import (
    INTERPRETED,
    compute_type,
    launch_next,
    pdl,
    wait,
    write_kv,
    write_qkv,
)

LOG2E = 1.4426950408889634

PlanKey = tuple[int, int, int | None, int]  # the arguments of `decode_plan` after the first


@triton.jit
def _pages(table, t, high, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Page ids of key tile t: one id where the tile lies in one page, else an id for each key."""
    if PAGE % TILE == 0:
        key = t * TILE
    else:
        key = t * TILE + tl.arange(0, TILE)
    return tl.load(table + key // PAGE, mask=key < high, other=0).to(tl.int64)


@triton.jit
def _query(q, dtype: tl.constexpr):
    """q in the type of the products. float16 clamps numbers beyond its largest ones."""
    if dtype == tl.float16:
        q = tl.minimum(tl.maximum(q.to(tl.float32), -65504.0), 65504.0)
    return q.to(dtype)


@triton.jit
def _load_tile(
    cache, page, head, t, inside, HKV: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Key tile t of K or V of one head, [TILE, DIM]. MASKED: only keys that are `inside`.

    Masked keys must not be read, because 0 times a stale NaN in V is NaN.
    """
    column = tl.arange(0, TILE)
    dim = tl.arange(0, DIM)
    if PAGE % TILE == 0:
        cache += (page * HKV + head) * (PAGE * D) + t * TILE % PAGE * D
        offset = (column * D)[:, None] + dim[None, :]
    else:
        key = t * TILE + column
        offset = ((page * HKV + head) * (PAGE * D) + key % PAGE * D)[:, None] + dim[None, :]
    if MASKED:
        mask = inside[:, None]
        if DIM > D:
            mask &= (dim < D)[None, :]
        tile = tl.load(cache + offset, mask=mask, other=0.0)
    elif DIM > D:
        tile = tl.load(cache + offset, mask=(dim < D)[None, :], other=0.0)
    else:
        tile = tl.load(cache + offset)
    return tile


@triton.jit
def _capped(s, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(s * SCALE / SOFTCAP), by tanh(x) = 1 - 2 / (1 + e^(2 x))."""
    FACTOR: tl.constexpr = 2.8853900817779268 * SCALE / SOFTCAP  # 2 log2(e)
    return SOFTCAP - (2.0 * SOFTCAP) / (1.0 + tl.exp2(s * FACTOR))


@triton.jit
def _sinks(sinks_ptr, q_head, mask, ROWS: tl.constexpr):
    """(m, prob_sum), [ROWS] each, before the first key.

    A sink is one more score of a head, which has no value. So a row begins with the sink as
    its maximum and 2^0 as its sum. Rows that `mask` excludes begin with nothing.
    """
    if sinks_ptr is None:
        m = tl.full([ROWS], -1e30, tl.float32)
        prob_sum = tl.zeros([ROWS], tl.float32)
    else:
        sink = tl.load(sinks_ptr + q_head, mask=mask, other=float("-inf")).to(tl.float32)
        m = tl.maximum(sink * 1.4426950408889634, -1e30)  # in units of log2
        prob_sum = tl.where(mask, tl.full([ROWS], 1.0, tl.float32), 0.0)
    return m, prob_sum


@triton.jit
def _fold_tiles(
    m, prob_sum, acc, q, q_position, k_cache, v_cache, table, head, tile, end, low, high,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Folds key tiles tile:end into (m, prob_sum, acc) by online softmax.

    (FlashAttention-2, Dao, 2023, algorithm 1.) m [rows]: maximum of the scores s so far,
    in units of log2. prob_sum [rows]: sum of 2^(s - m). acc [rows, dim]: sum of 2^(s - m)
    v. Keys outside low:high are not read. MASKED applies causality (key <= q_position)
    and the window. Without MASKED every row must see every key.
    """
    UNIT: tl.constexpr = SCALE if SOFTCAP == 0.0 else 1.0  # of s below, in units of log2
    column = tl.arange(0, TILE)
    page = _pages(table, tile, high, PAGE, TILE)
    for t in range(tile, end):
        key = t * TILE + column
        inside = key < high
        if WINDOW > 0:
            inside &= key >= low
        # Page ids are loaded one iteration early, because Triton would otherwise spend
        # stages of its pipeline on them and not on K and V.
        next_page = _pages(table, t + 1, high, PAGE, TILE)
        k = _load_tile(k_cache, page, head, t, inside, HKV, D, q.shape[1], PAGE, TILE, MASKED)
        v = _load_tile(v_cache, page, head, t, inside, HKV, DV, acc.shape[1], PAGE, TILE, MASKED)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if SOFTCAP > 0.0:
            s = _capped(s, SCALE, SOFTCAP)
        if MASKED:
            visible = key[None, :] <= q_position[:, None]
            if WINDOW > 0:
                visible &= key[None, :] > q_position[:, None] - WINDOW
            s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * UNIT)
        p = tl.exp2(s * UNIT - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        prob_sum = prob_sum * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        m = m_new
        page = next_page
    return m, prob_sum, acc


@triton.jit(do_not_specialize=["table_stride", "num_sequences"])
def _prefill_kernel(
    q_ptr, out_ptr, k_cache, v_cache, sinks_ptr, tables, table_stride, context_lens, query_start,
    num_sequences,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HKV: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, DV: tl.constexpr, DIMV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M // GROUP queries of a sequence, with all heads of a KV head.

    `_decode_kernel` computes sequences of a single query.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    # The last query tiles run first, because they see the most keys.
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = 0  # the program's sequence: the number of sequences whose tiles lie before `index`
    first = 0  # the number of tiles of these sequences
    tiles_before = 0
    for i in range(0, num_sequences, 128):
        at = i + tl.arange(0, 128)
        inside = at < num_sequences
        begin = tl.load(query_start + at, mask=inside, other=0)
        length = tl.load(query_start + at + 1, mask=inside, other=0) - begin
        tiles = tl.where(length > 1, tl.cdiv(length, BLOCK_Q), 0)
        before = inside & (tiles_before + tl.cumsum(tiles) <= index)
        sequence += tl.sum(before.to(tl.int32))
        first += tl.sum(tl.where(before, tiles, 0))
        tiles_before += tl.sum(tiles)
    if sequence == num_sequences:
        return
    start = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - start
    first_query = (index - first) * BLOCK_Q
    context = tl.load(context_lens + sequence)
    past = context - count

    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DIM)
    token = first_query + row // GROUP
    q_position = past + token
    q_head = head * GROUP + row % GROUP
    place = (start + token).to(tl.int64)
    offset = (place * (HKV * GROUP * D) + q_head * D)[:, None] + dim[None, :]
    is_query = (row < BLOCK_Q * GROUP) & (token < count)
    inside = is_query[:, None] & (dim < D)[None, :]
    q = _query(tl.load(q_ptr + offset, mask=inside, other=0.0), COMPUTE)

    low = tl.maximum(past + first_query - WINDOW + 1, 0) if WINDOW > 0 else 0
    high = tl.minimum(context, past + first_query + BLOCK_Q)
    tile = low // TILE
    # All rows see every key of the tiles before `full`.
    full = tile if WINDOW > 0 else (past + first_query + 1) // TILE
    m, prob_sum = _sinks(sinks_ptr, q_head, is_query, BLOCK_M)
    acc = tl.zeros([BLOCK_M, DIMV], tl.float32)
    table = tables + tl.cast(sequence, tl.int64) * table_stride
    if WINDOW == 0:
        m, prob_sum, acc = _fold_tiles(
            m, prob_sum, acc, q, q_position, k_cache, v_cache, table, head, tile, full, low, high,
            SCALE, SOFTCAP, HKV, D, DV, PAGE, TILE, WINDOW, False,
        )  # fmt: skip
    m, prob_sum, acc = _fold_tiles(
        m, prob_sum, acc, q, q_position, k_cache, v_cache, table, head,
        full, tl.cdiv(high, TILE), low, high,
        SCALE, SOFTCAP, HKV, D, DV, PAGE, TILE, WINDOW, True,
    )  # fmt: skip
    dim = tl.arange(0, DIMV)
    offset = (place * (HKV * GROUP * DV) + q_head * DV)[:, None] + dim[None, :]
    inside = is_query[:, None] & (dim < DV)[None, :]
    tl.store(out_ptr + offset, acc / tl.maximum(prob_sum, 1e-30)[:, None], mask=inside)


@triton.jit(do_not_specialize=["num_sequences"])
def _plan_kernel(
    context_lens, query_start, num_sequences, share_ptr, first_ptr, start_ptr, sequence_ptr,
    HKV: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, PROGRAMS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Splits the decode work of a step into equal shares, as `decode_plan` describes.

    One program writes where CHUNK programs of the decode kernel begin.
    """
    total = 0
    for i in range(0, num_sequences, CHUNK):
        at = i + tl.arange(0, CHUNK)
        tiles, _ = _tiles(context_lens, query_start, num_sequences, at, HKV, TILE, WINDOW)
        total += tl.sum(tiles)
    share = tl.maximum(tl.cdiv(total, PROGRAMS), 1)
    tl.store(share_ptr, share)
    tl.store(share_ptr + 1, total)

    program = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    first = tl.zeros([CHUNK], tl.int32)
    before = 0
    rank = 0
    for i in range(0, num_sequences, CHUNK):
        at = i + tl.arange(0, CHUNK)
        tiles, decodes = _tiles(context_lens, query_start, num_sequences, at, HKV, TILE, WINDOW)
        end = before + tl.cumsum(tiles)
        index = rank + tl.cumsum(decodes) - 1
        tl.store(start_ptr + index, end - tiles, mask=decodes > 0)
        tl.store(sequence_ptr + index, at, mask=decodes > 0)
        passed = (end[None, :] <= (program * share)[:, None]) & (decodes > 0)[None, :]
        first += tl.sum(passed.to(tl.int32), 1)
        before += tl.sum(tiles)
        rank += tl.sum(decodes)
    tl.store(start_ptr + rank, total)
    tl.store(first_ptr + program, first, mask=program < PROGRAMS)


@triton.jit
def _tiles(
    context_lens,
    query_start,
    num_sequences,
    at,
    HKV: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Of sequences `at`: (key tiles over all KV heads, 1 if the sequence has a single query)."""
    inside = at < num_sequences
    begin = tl.load(query_start + at, mask=inside, other=0)
    decodes = (tl.load(query_start + at + 1, mask=inside, other=0) - begin == 1) & inside
    context = tl.load(context_lens + at, mask=inside, other=0)
    low = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else 0
    # At least one tile, because a padding sequence of context 0 has an output row to
    # clear.
    tiles = tl.maximum(tl.cdiv(context, TILE) - low // TILE, 1)
    return tl.where(decodes, tiles * HKV, 0), decodes.to(tl.int32)


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    q_ptr, out_ptr, k_cache, v_cache, sinks_ptr, tables, table_stride, context_lens, query_start,
    share_ptr, first_ptr, start_ptr, sequence_ptr, partial_ptr, arrived_ptr, PDL: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HKV: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, DV: tl.constexpr, DIMV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: its share of key tiles, one segment after the other.

    A segment is a run of tiles of one (sequence, KV head). A segment that holds all tiles
    of its (sequence, head) writes the output. Other segments store a partial (m,
    prob_sum, acc). The last program to arrive combines them, always in the order of their
    keys (Flash-Decoding, Dao et al., 2023).
    """
    wait(PDL)
    program = tl.program_id(0)
    tile = program * tl.load(share_ptr)
    end = tl.minimum(tile + tl.load(share_ptr), tl.load(share_ptr + 1))
    index = tl.load(first_ptr + program)

    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DIM)
    q_inside = (row < GROUP)[:, None] & (dim < D)[None, :]
    q_inner = row[:, None] * D + dim[None, :]
    dim = tl.arange(0, DIMV)
    inside = (row < GROUP)[:, None] & (dim < DV)[None, :]
    inner = row[:, None] * DV + dim[None, :]
    # A partial result: acc [GROUP, DV], then m [GROUP], then prob_sum [GROUP].
    STATS: tl.constexpr = GROUP * DV
    PARTIAL: tl.constexpr = GROUP * (DV + 2)
    while tile < end:
        base = tl.load(start_ptr + index)
        count = (tl.load(start_ptr + index + 1) - base) // HKV  # tiles of one head
        sequence = tl.load(sequence_ptr + index)
        context = tl.load(context_lens + sequence)
        head = (tile - base) // count
        segment = base + head * count
        begin = tile - segment
        stop = tl.minimum(count, end - segment)
        low = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else 0
        place = tl.load(query_start + sequence).to(tl.int64) * HKV + head
        q_offset = place * (GROUP * D)
        q = _query(tl.load(q_ptr + q_offset + q_inner, mask=q_inside, other=0.0), COMPUTE)
        offset = place * (GROUP * DV)
        # The segment with the first tile takes the sinks, so that they count once.
        takes = (row < GROUP) & (begin == 0)
        m, prob_sum = _sinks(sinks_ptr, head * GROUP + row, takes, BLOCK_M)
        acc = tl.zeros([BLOCK_M, DIMV], tl.float32)
        m, prob_sum, acc = _fold_tiles(
            m, prob_sum, acc, q, tl.full([BLOCK_M], context - 1, tl.int32), k_cache, v_cache,
            tables + sequence.to(tl.int64) * table_stride, head,
            low // TILE + begin, low // TILE + stop, low, context,
            SCALE, SOFTCAP, HKV, D, DV, PAGE, TILE, WINDOW, True,
        )  # fmt: skip

        if stop - begin < count:
            # A program has at most two partial results. Only its first segment can have
            # begun in another program, and only its last one can go on in another.
            share = tl.load(share_ptr)
            leader = segment // share
            last = (segment + count - 1) // share
            partial = partial_ptr + (2 * program + (program == leader).to(tl.int32)) * PARTIAL
            tl.store(partial + inner, acc, mask=inside)
            tl.store(partial + STATS + row, m, mask=row < GROUP)
            tl.store(partial + STATS + GROUP + row, prob_sum, mask=row < GROUP)
            tl.debug_barrier()  # all threads have stored before one counts the arrival
            if tl.atomic_add(arrived_ptr + leader, 1, sem="acq_rel") == last - leader:
                tl.store(arrived_ptr + leader, 0)  # for the next launch
                _combine(partial_ptr, leader, last, out_ptr + offset, GROUP, DV, DIMV)
        else:
            out = out_ptr + offset + inner
            tl.store(out, acc / tl.maximum(prob_sum, 1e-30)[:, None], mask=inside)
        tile = segment + stop
        index += (tile == base + count * HKV).to(tl.int32)
    launch_next(PDL)


@triton.jit
def _combine(
    partial_ptr, leader, last, out_ptr, GROUP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr
):
    """Combines the partial results of programs leader..last into the output [GROUP, D].

    It loads the partial results of eight programs at once.
    """
    ROWS: tl.constexpr = triton.next_power_of_2(GROUP)
    STATS: tl.constexpr = GROUP * D
    # The added minimum is always 0, which the compiler does not know. Without it the
    # compiler would compute these tensors before the loop over keys and spill registers.
    row = tl.arange(0, ROWS) + tl.minimum(leader, 0)
    dim = tl.arange(0, DIM)
    inside = (row < GROUP)[:, None] & (dim < D)[None, :]
    inner = row[:, None] * D + dim[None, :]
    m = tl.full([ROWS], -1e30, tl.float32)
    prob_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for base in range(leader, last + 1, 8):
        for i in tl.static_range(8):
            program = base + i
            place = 2 * program + (program == leader).to(tl.int32)
            partial = partial_ptr + place * (GROUP * (D + 2))
            sums = partial + STATS + GROUP + row
            some = (row < GROUP) & (program <= last)
            all_of = inside & (program <= last)
            # .cg loads from L2, because L1 does not see the stores of other
            # multiprocessors.
            m_i = tl.load(partial + STATS + row, mask=some, other=-1e30, cache_modifier=".cg")
            sum_i = tl.load(sums, mask=some, other=0.0, cache_modifier=".cg")
            acc_i = tl.load(partial + inner, mask=all_of, other=0.0, cache_modifier=".cg")
            m_new = tl.maximum(m, m_i)
            prob_sum = prob_sum * tl.exp2(m - m_new) + sum_i * tl.exp2(m_i - m_new)
            acc = acc * tl.exp2(m - m_new)[:, None] + acc_i * tl.exp2(m_i - m_new)[:, None]
            m = m_new
    tl.store(out_ptr + inner, acc / tl.maximum(prob_sum, 1e-30)[:, None], mask=inside)


@dataclass
class LayerLaunch:
    """How both kernels are launched for layers of one shape."""

    layer: PagedKV
    constants: dict[str, object]  # of both kernels
    prefill: Shape
    decode: Shape
    programs: int  # of a decode launch

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.layer.num_heads // self.layer.num_kv_heads

    @property
    def plan_key(self) -> PlanKey:
        """What the plan of a step depends on: layers of one key share a plan."""
        tile = self.decode["TILE"]
        return (self.layer.num_kv_heads, tile, self.layer.window, self.programs)

    @property
    def partial_size(self) -> int:
        """Numbers of the partial results of a decode launch, two for each program."""
        return 2 * self.programs * self.group * (self.layer.value_size + 2)


def layer_launch(
    layer: PagedKV, spec: AttentionSpec, cache_dtype: torch.dtype, gpu: DeviceProperties
) -> LayerLaunch:
    """The launches for `layer`, one of the layers of `spec`."""
    head_dim = layer.head_dim
    value_dim = layer.value_size
    largest = max(head_dim, value_dim)
    group = layer.num_heads // layer.num_kv_heads
    prefill = prefill_shape(gpu.kind, group, largest, spec.dtype, cache_dtype)
    decode = decode_shape(gpu.kind, group, largest, spec.dtype, cache_dtype, spec.block_size)
    programs = decode_programs(gpu, decode, largest, cache_dtype)
    fp8 = cache_dtype == torch.float8_e4m3fn
    compute = torch.float16 if fp8 and spec.dtype == torch.bfloat16 else spec.dtype
    constants: dict[str, object] = {
        "SCALE": layer.score_scale * LOG2E,
        "SOFTCAP": (layer.softcap or 0.0) * LOG2E,
        "HKV": layer.num_kv_heads,
        "GROUP": group,
        "D": head_dim,
        "DIM": max(power_of_2(head_dim), 16),  # matrix instructions take at least 16
        "DV": value_dim,
        "DIMV": max(power_of_2(value_dim), 16),
        "PAGE": spec.block_size,
        "WINDOW": layer.window or 0,
        "COMPUTE": compute_type(compute),
    }
    return LayerLaunch(layer, constants, prefill, decode, programs)


class TritonAttention(AttentionBackend):
    """Pages are [num_blocks, Hkv, block_size, D], K and V of each layer apart.

    One head of one page is thus one run of memory. With kv_cache_dtype "fp8" pages hold
    float8 e4m3 with a scale of 1. Its range (448) is enough for the K and V of trained
    models, and its mantissa has 3 bits. Products then run in float16, because GPUs
    convert float8 to float16 in fewer instructions than to bfloat16. float16 holds float8
    exactly. It holds the q of bfloat16 exactly from 6e-5 to 65504; larger numbers are
    clamped.
    """

    @staticmethod
    def refuses(spec: AttentionSpec) -> str | None:
        if spec.device.type != "cuda" and not INTERPRETED:
            return f"Triton compiles for GPUs, not for {spec.device.type}"
        if spec.device.type == "cuda" and kernels.gpu() is None:
            return "Triton cannot run kernels here, and a warning says why"
        capability = gpu_table.device_properties(spec.device).capability
        if capability < OLDEST:
            return "it needs compute capability {}.{} or higher, not {}.{}".format(
                *OLDEST, *capability
            )
        if capability < (8, 0) and spec.dtype == torch.bfloat16:
            return "products in bfloat16 need compute capability 8.0; dtype='float16' runs"
        if spec.largest_head > 256:
            return f"its tiles hold head sizes up to 256, not {spec.largest_head}"
        return None

    def __init__(self, spec: AttentionSpec, kv_cache_dtype: str = "auto") -> None:
        super().__init__(spec)
        if kv_cache_dtype not in ("auto", "fp8"):
            raise ValueError(
                f"kv_cache_dtype={kv_cache_dtype!r} is not known; accepted are 'auto' and 'fp8'"
            )
        gpu = gpu_table.device_properties(spec.device)
        fp8 = kv_cache_dtype == "fp8"
        if fp8 and (gpu.capability < (8, 9) or torch.version.hip):
            raise ValueError(
                "kv_cache_dtype='fp8' needs an NVIDIA GPU of compute capability 8.9 or higher "
                "(Ada, Hopper)"
            )
        self.cache_dtype = torch.float8_e4m3fn if fp8 else spec.dtype
        self.shapes = {
            layer: layer_launch(layer, spec, self.cache_dtype, gpu) for layer in set(spec.layers)
        }
        self.launches = [self.shapes[layer] for layer in spec.layers]

    def page_bytes(self) -> int:
        return super().page_bytes() // self.spec.dtype.itemsize * self.cache_dtype.itemsize

    def allocate(self, num_blocks: int) -> None:
        spec = self.spec
        shapes = []
        for layer in spec.layers:
            page = (num_blocks, layer.num_kv_heads, spec.block_size)
            shapes.append(((*page, layer.head_dim), (*page, layer.value_size)))
        # The pages of each layer are made once, because each new view costs the host time.
        self.cache, self.pages = zeroed_pages(shapes, self.cache_dtype, spec.device)
        partial_size = max(launch.partial_size for launch in self.shapes.values())
        programs = max(launch.programs for launch in self.shapes.values())
        self.partial = torch.empty(partial_size, device=spec.device)
        self.arrived = torch.zeros(programs, dtype=torch.int32, device=spec.device)

    def begin(self, meta: AttentionMetadata[Tensor]) -> None:
        """Plans the decoding of the step.

        A kernel makes the plan, so a CUDA graph must capture `begin` together with the
        layers.
        """
        super().begin(meta)
        keys = {launch.plan_key for launch in self.shapes.values()}
        self.plans = {key: decode_plan(meta, *key) for key in keys}

    def write(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        return write_qkv(qkv, self.meta.positions, self.meta.slot_mapping, rope, *self.pages[layer])

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        write_kv(k, v, self.meta.slot_mapping, *self.pages[layer])

    def attend(self, layer: int, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        spec, meta, launch = self.spec.layers[layer], self.meta, self.launches[layer]
        out = q.new_empty(*q.shape[:2], spec.value_size)
        tables = (
            meta.block_tables,
            meta.block_tables.stride(0),
            meta.context_lens,
            meta.query_start,
        )
        _decode_kernel[(launch.programs,)](
            q, out, *self.pages[layer], sinks, *tables, *self.plans[launch.plan_key],
            self.partial, self.arrived, **launch.constants, **launch.decode, **pdl(q.device),
        )  # fmt: skip
        if meta.num_prefills:
            block = launch.prefill["BLOCK_M"] // launch.group
            # At least the sum of ceil(query_len / block) over the sequences with prefill.
            grid = (len(q) // block + meta.num_prefills, spec.num_kv_heads)
            _prefill_kernel[grid](
                q, out, *self.pages[layer], sinks, *tables, len(meta.context_lens),
                **launch.constants, **launch.prefill,
            )  # fmt: skip
        return out.flatten(1)


def decode_plan(
    meta: AttentionMetadata[Tensor], num_kv_heads: int, tile: int, window: int | None, programs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Splits the work of decoding into equal, contiguous shares of key tiles.

    All sequences with a single query take part. Their tiles stand in one line: by
    sequence, then by KV head, then in the order of keys. Program p takes the tiles p *
    share : (p + 1) * share. So the device decides how many programs share a sequence, by
    the work of the step and the size of the GPU, while the launch stays the same
    (Stream-K, Osama et al., 2023).

    Returns int32 tensors. (share, total) [2]. `first` [programs]: index of the sequence
    in which a program begins. `start` [S + 1]: where the tiles of a sequence begin in the
    line. `sequence` [S]: the number of that sequence in the batch.
    """
    num_sequences = len(meta.context_lens)
    device = meta.context_lens.device
    share, first, start, sequence = (
        torch.empty(size, dtype=torch.int32, device=device)
        for size in (2, programs, num_sequences + 1, num_sequences)
    )
    _plan_kernel[(ceil_div(programs, 64),)](
        meta.context_lens, meta.query_start, num_sequences, share, first, start, sequence,
        num_kv_heads, tile, window or 0, programs, 64, num_warps=4,
    )  # fmt: skip
    return share, first, start, sequence
