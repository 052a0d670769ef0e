"""The Triton kernels against float32 references: on a GPU where there is one, else under Triton's interpreter.

Interpreting is decided when triton is first imported, so one test runs this file again in a process of its own. There a
conversion to bfloat16 or float8 truncates where a GPU rounds: tolerances are one unit in the last place of the type.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_reference import make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import INTERPRETED, run_interpreted, starts_interpreter

RUNS = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
pytest.importorskip("triton", reason="no triton for this platform")

if RUNS:
    from nanovllm.attention.base import AttentionSpec
    from nanovllm.attention.triton_backend import TritonAttention, decode_plan
    from nanovllm.core.batch import AttentionMetadata
    from nanovllm.kernels import moe_triton, qk_norm_rope, triton_ops
    from nanovllm.kernels.gpu_table import DeviceProperties, decode_programs, decode_shape
    from nanovllm.kernels.rope import Rope

EPS = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def runs(test):
    """Marks a test of kernels: of the GPU suite, but for the process that interprets."""
    test = pytest.mark.skipif(
        not RUNS, reason="no CUDA device; test_under_the_interpreter runs it"
    )(test)
    return test if INTERPRETED else pytest.mark.gpu(test)


# About half of the time.
ATTENTION = "test_attention or splits or decodes or same_bits or words or shapes"


@pytest.mark.skipif(RUNS, reason="this process runs the kernels itself")
@starts_interpreter
@pytest.mark.parametrize("tests", [ATTENTION, f"not ({ATTENTION})"], ids=["attention", "rest"])
def test_under_the_interpreter(tests):
    assert "passed" in run_interpreted(__file__, "-k", tests)


# Attention


def quick_backend(case):
    """The backend. Under the interpreter torch fills its pages, which is many times faster.

    The kernel that fills them has its own tests: "Writing K and V".
    """
    backend = TritonAttention(case.spec)

    def store(layer, k, v):
        slots = backend.meta.slot_mapping.long()
        page, offset = slots // case.spec.block_size, slots % case.spec.block_size
        for new, pages in zip((k, v), backend.pages[layer]):
            pages[page, :, offset] = new

    if INTERPRETED:
        backend.store = store
    return backend


def attend(query_lens, context_lens, programs=7, **shape):
    """(backend, what it gives, what the reference gives) for the last of the case's layers."""
    case = make_case(query_lens, context_lens, device=DEVICE, **shape)
    backend = quick_backend(case)
    for launch in backend.launches:
        launch.programs = programs
    layer = len(case.spec.layers) - 1
    return backend, case.run(backend, layer).float(), case.expected(layer)


RAGGED = [
    ([1], [1]),
    ([5, 1, 40], [5, 100, 70]),  # a fresh prompt, a decode, a chunk with a past: a mixed batch
    ([1, 1, 1, 1], [15, 64, 65, 130]),
]


@runs
@pytest.mark.parametrize(("query_lens", "context_lens"), RAGGED)
@pytest.mark.parametrize(
    ("heads", "dim", "page", "window", "dtype"),
    [
        ((4, 2), 64, 16, None, torch.bfloat16),
        ((6, 2), 64, 64, 20, torch.float16),
        ((3, 1), 80, 16, 70, torch.float16),
        ((2, 2), 128, 32, None, torch.bfloat16),
        ((5, 1), 96, 256, 7, torch.bfloat16),
        ((2, 1), 256, 16, None, torch.float16),
        ((2, 1), 8, 16, None, torch.bfloat16),
    ],
)
def test_attention(query_lens, context_lens, heads, dim, page, window, dtype):
    _, out, expected = attend(
        query_lens,
        context_lens,
        heads=heads,
        head_dim=dim,
        block_size=page,
        windows=(None, window),
        dtype=dtype,
    )
    torch.testing.assert_close(out, expected, atol=2 * EPS[dtype], rtol=EPS[dtype])


@runs
@pytest.mark.parametrize(("query_lens", "context_lens"), RAGGED)
@pytest.mark.parametrize("window", [None, 50])
def test_attention_in_float32_is_exact(query_lens, context_lens, window):
    backend, out, expected = attend(query_lens, context_lens, windows=(window,))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    assert not backend.arrived.any()  # left as the next launch needs it


# A word is what a layer asks for beside plain attention: see `PagedKV`.
WORDS = [
    {"softcap": 2.0},
    {"sinks": True},
    {"value_dim": 24},
    {"softcap": 5.0, "sinks": True, "value_dim": 80, "windows": (20,)},
]


@runs
@pytest.mark.parametrize("words", WORDS, ids=str)
def test_words_of_attention_in_float32(words):
    _, out, expected = attend([5, 1, 9], [5, 60, 30], head_dim=32, **words)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@runs
@pytest.mark.parametrize(
    ("heads", "dim", "words", "dtype"),
    [
        ((8, 1), 64, {"sinks": True, "windows": (None, 40)}, torch.bfloat16),  # gpt-oss
        ((4, 2), 128, {"softcap": 50.0, "windows": (40,)}, torch.bfloat16),  # Gemma 2
        ((2, 2), 192, {"value_dim": 128}, torch.float16),  # DeepSeek
    ],
)
def test_words_of_attention_in_half_precision(heads, dim, words, dtype):
    lens = ([5, 1, 20], [5, 70, 50])
    _, out, expected = attend(*lens, heads=heads, head_dim=dim, dtype=dtype, **words)
    torch.testing.assert_close(out, expected, atol=2 * EPS[dtype], rtol=EPS[dtype])


@runs
@pytest.mark.parametrize(("programs", "window"), [(1, None), (5, 30), (40, None)])
def test_sinks_count_once_however_the_work_splits(programs, window):
    options = {"heads": (2, 2), "head_dim": 32, "windows": (window,), "sinks": True}
    _, out, expected = attend([1, 1, 1], [3, 100, 77], programs, **options)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@runs
@pytest.mark.parametrize("sink", [-1e4, 1e4, float("-inf")])
def test_sinks_of_any_size(sink):
    case = make_case([2, 1], [40, 30], device=DEVICE, sinks=True)
    case.sinks[:] = sink
    torch.testing.assert_close(
        case.run(quick_backend(case), 0), case.expected(0), atol=2e-6, rtol=1e-5
    )


@runs
def test_layers_of_different_shapes_in_one_model():
    """Each layer has pages of its own shape, and layers share plans and scratch memory."""
    cases = [
        make_case([3, 1], [3, 24], device=DEVICE, **shape)
        for shape in (
            {"heads": (4, 2), "head_dim": 32},
            {"heads": (4, 1), "head_dim": 64, "windows": (16,), "softcap": 3.0},
            {"heads": (4, 2), "head_dim": 32, "value_dim": 16, "sinks": True},
        )
    ]
    layers = tuple(case.spec.layers[0] for case in cases)
    backend = TritonAttention(AttentionSpec(layers, 16, torch.float32, torch.device(DEVICE)))
    numbers = sum(layer.num_kv_heads * (layer.head_dim + layer.value_size) for layer in layers)
    assert backend.page_bytes() == numbers * 16 * 4
    backend.allocate(cases[0].num_blocks)
    allocated = sum(pages.nbytes for pages in backend.cache)
    assert allocated == backend.page_bytes() * cases[0].num_blocks
    for begins, ends in (([0, 0], [2, 23]), ([2, 23], [3, 24])):
        backend.begin(cases[0].metadata(begins, ends))
        outs = []
        for layer, case in enumerate(cases):
            new = [slice(*ends) for ends in zip(begins, ends)]
            k, v = (torch.cat([x[tokens] for x, tokens in zip(xs, new)]) for xs in (case.k, case.v))
            backend.store(layer, k, v)
            q = torch.randn(len(k), 4, layers[layer].head_dim, device=DEVICE)
            case.q = list(q.split([len(range(*ends)) for ends in zip(begins, ends)]))
            outs.append(backend.attend(layer, q, case.sinks))
    for case, out in zip(cases, outs):
        torch.testing.assert_close(out, case.expected(0), atol=2e-6, rtol=1e-5)
    assert len(backend.plans) == 2


@runs
def test_prompts_are_found_among_many_decodes():
    """The kernel reads the lengths of 128 sequences at a time: prompts stand on both sides of that border."""
    query_lens = [1, 20, 3] + [1] * 124 + [2, 3, 1, 17, 1]
    context_lens = [2, 25, 3] + [1 + i % 9 for i in range(124)] + [2, 5, 9, 20, 5]
    _, out, expected = attend(query_lens, context_lens, heads=(2, 1))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@runs
@pytest.mark.parametrize("programs", [1, 5, 24, 100])
@pytest.mark.parametrize("window", [None, 60])
def test_any_number_of_splits_gives_the_same_attention(programs, window):
    contexts = [3, 180 if programs == 100 else 100, 77]  # more than eight programs for one head
    _, out, expected = attend(
        [1, 1, 1], contexts, programs, heads=(2, 2), head_dim=32, windows=(window,)
    )
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter runs programs one after another")
@pytest.mark.parametrize("window", [None, 60])
def test_the_order_of_programs_does_not_change_a_bit(monkeypatch, window):
    """A GPU runs programs in any order: any program of a sequence may finish last and combine."""
    from triton.runtime.interpreter import interpreter_builder

    programs = 9
    case = make_case([1, 1, 1], [3, 130, 77], heads=(1, 1), head_dim=32, windows=(window,))
    backend = quick_backend(case)
    backend.launches[0].programs = programs
    outs = [case.run(backend, 0)]
    torch.testing.assert_close(outs[0], case.expected(0), atol=2e-6, rtol=1e-5)
    set_index = interpreter_builder.set_grid_idx
    others = [torch.randperm(programs, generator=torch.manual_seed(i)).tolist() for i in range(4)]
    for places in (list(range(programs))[::-1], *others):

        def set_other(x, y, z, places=places):
            set_index(places[x] if interpreter_builder.grid_dim[0] == programs else x, y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_other)
        outs.append(backend.attend(0, torch.cat(case.q)))
        assert not backend.arrived.any()
    assert all(torch.equal(out, outs[0]) for out in outs)


@runs
def test_scores_of_any_size():
    """The running maximum keeps exp in range, also when the largest score comes last."""
    case = make_case([2, 1], [80, 80], device=DEVICE)
    for k in case.k:
        k *= torch.linspace(0, 60, len(k), device=DEVICE)[:, None, None]
    torch.testing.assert_close(
        case.run(quick_backend(case), 0), case.expected(0), atol=1e-5, rtol=1e-4
    )


@runs
def test_padding_rows_and_stale_pages_change_no_output():
    """A CUDA graph pads with rows of context 0 or 1 that write nowhere; free pages may hold NaN."""
    case = make_case([1, 1], [20, 33], device=DEVICE)
    backend = TritonAttention(case.spec)
    case.run(backend, 0)
    used = torch.zeros(case.num_blocks, 16, dtype=torch.bool)
    for row, context in zip(case.block_tables, case.context_lens):
        for position in range(context):
            used[row[position // 16], position % 16] = True
    for pages in backend.pages[0]:
        pages.masked_fill_(~used[:, None, :, None].to(DEVICE), float("nan"))

    def int32(*values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    wide = torch.zeros(
        4, 64, dtype=torch.int32, device=DEVICE
    )  # rows are slices of a larger buffer
    wide[:2, : case.block_tables.shape[1]] = case.block_tables
    meta = AttentionMetadata(
        int32(19, 32, 0, 0),
        int32(-1, -1, -1, -1),
        int32(0, 1, 2, 3, 4),
        int32(20, 33, 0, 0),
        wide[:, :9],
        1,
        0,
        33,
    )
    backend.begin(meta)
    before = torch.cat(backend.cache)
    junk = torch.full((4, 2, 64), 9.0, device=DEVICE)
    backend.store(0, junk, junk)
    torch.testing.assert_close(torch.cat(backend.cache), before, equal_nan=True)
    out = backend.attend(0, torch.cat([*case.q, torch.ones(2, 4, 64, device=DEVICE)]))
    torch.testing.assert_close(out[:2], case.expected(0), atol=2e-6, rtol=1e-5)
    assert not out[2:].any()


@runs
@settings(max_examples=15, deadline=None)
@given(
    lens=st.lists(
        st.tuples(st.sampled_from([0, 1, 1, 1, 5]), st.integers(0, 300)), min_size=1, max_size=80
    ),
    heads=st.integers(1, 3),
    window=st.sampled_from([None, 40]),
    programs=st.sampled_from([1, 7, 100]),
)
def test_plan_deals_equal_shares_of_one_line_of_tiles(lens, heads, window, programs):
    counts = torch.tensor([n for n, _ in lens])
    starts = torch.cat((torch.zeros(1), counts.cumsum(0))).int().to(DEVICE)
    contexts = torch.tensor([c for _, c in lens], dtype=torch.int32, device=DEVICE)
    unused = torch.empty(0, device=DEVICE)
    meta = AttentionMetadata(unused, unused, starts, contexts, unused, 5, 1, 300)
    share, first, start, sequence = (
        x.tolist() for x in decode_plan(meta, heads, 16, window, programs)
    )

    line = []  # the sequence that each tile belongs to
    alone = [i for i, (n, _) in enumerate(lens) if n == 1]
    for i in alone:
        context = lens[i][1]
        line += (
            [i]
            * heads
            * max(1, (context + 15) // 16 - (max(context - window, 0) // 16 if window else 0))
        )
    assert share == [max(1, (len(line) + programs - 1) // programs), len(line)]
    assert sequence[: len(alone)] == alone
    assert start[: len(alone) + 1] == [*(line.index(i) for i in alone), len(line)]
    for program in range(programs):
        if program * share[0] < len(line):
            assert alone[first[program]] == line[program * share[0]]


@runs
def test_decode_launch_fills_the_gpu_once():
    def programs(dim, dtype, cache=None, page=64, capability=(9, 0), multiprocessors=132):
        gpu = DeviceProperties(capability, multiprocessors)
        shape = decode_shape(gpu.kind, 2, dim, dtype, cache or dtype, page)
        return decode_programs(gpu, shape, dim, cache or dtype)

    assert programs(128, torch.bfloat16) == 3 * 132  # H200
    assert programs(64, torch.bfloat16) == 4 * 132
    assert programs(256, torch.bfloat16) == 2 * 132
    assert programs(128, torch.bfloat16, torch.float8_e4m3fn) == 3 * 132
    assert programs(128, torch.bfloat16, torch.float8_e4m3fn, page=16) == 2 * 132
    assert programs(128, torch.bfloat16, capability=(8, 0), multiprocessors=108) == 2 * 108  # A100
    assert programs(128, torch.bfloat16, capability=(8, 9), multiprocessors=58) == 2 * 58  # L4
    assert programs(128, torch.float16, capability=(7, 5), multiprocessors=40) == 2 * 40  # T4


# Writing K and V


@runs
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_equals_norm_rope_and_store(dim, eps, dtype):
    assert_writes(dim, dim, eps, 0.0, dtype)


@runs
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 16), (128, 96), (96, 2)])
@pytest.mark.parametrize(("eps", "offset"), [(None, 0.0), (0.0, 0.0), (1e-6, 1.0)])
def test_write_turns_the_first_numbers_and_adds_the_norm_s_offset(dim, rotary_dim, eps, offset):
    assert_writes(dim, rotary_dim, eps, offset, torch.float32)


def assert_writes(dim, rotary_dim, eps, offset, dtype):
    torch.manual_seed(0)
    case = make_case([5, 3], [20, 35], heads=(3, 1), head_dim=dim, dtype=dtype, device=DEVICE)
    angles = torch.rand(64, rotary_dim // 2) * 6
    rope = Rope(3, 1, dim, torch.cat((angles.cos(), angles.sin()), 1).to(DEVICE))
    if eps is not None:
        q_norm, k_norm = torch.randn(2, dim, device=DEVICE).to(dtype)
        rope = Rope(3, 1, dim, rope.cos_sin, q_norm, k_norm, eps, offset)
    backend, plain = TritonAttention(case.spec), TritonAttention(case.spec)
    for each in (backend, plain):
        each.allocate(case.num_blocks)
        each.begin(case.metadata([15, 32], [20, 35]))
    backend.meta.slot_mapping[2] = -1
    qkv = torch.randn(8, 5 * dim, device=DEVICE).to(dtype)
    q, k, v = qk_norm_rope(qkv, backend.meta.positions, rope)
    plain.meta.slot_mapping[2] = -1
    plain.store(0, k, v)
    tolerance = {
        "atol": 6 * EPS[dtype],
        "rtol": 2 * EPS[dtype],
    }  # the definition rounds after every product
    torch.testing.assert_close(backend.write(0, qkv, rope), q, **tolerance)
    torch.testing.assert_close(backend.cache, plain.cache, **tolerance)
    keys, _ = backend.pages[0]
    assert keys.any(-1).sum() == 7


@runs
@pytest.mark.parametrize("sizes", [(64, 64), (64, 40), (9, 7)])
def test_store_keeps_keys_and_values_of_any_size(sizes):
    dim, value_dim = sizes
    case = make_case([3], [20], head_dim=dim, value_dim=value_dim, device=DEVICE)
    backend = TritonAttention(case.spec)
    backend.allocate(case.num_blocks)
    backend.begin(case.metadata([17], [20]))
    k, v = case.k[0][17:], case.v[0][17:]
    backend.store(0, k, v)
    for stored, pages in zip((k, v), backend.pages[0]):
        slots = pages.transpose(1, 2).flatten(0, 1)  # [slots, Hkv, size]
        written = backend.meta.slot_mapping.long()
        assert torch.equal(slots[written], stored)
        assert slots.any(-1).sum() == stored.any(-1).sum()


@runs
def test_write_fills_pages_of_any_layout():
    """flash-attn's pages are [num_blocks, block_size, Hkv, D], so a head's tokens lie apart."""
    torch.manual_seed(0)
    angles = torch.rand(64, 16) * 6
    rope = Rope(3, 2, 32, torch.cat((angles.cos(), angles.sin()), 1).to(DEVICE))
    positions = tensor([3, 9, 20], torch.int32)
    slots = tensor([5, -1, 17], torch.int32)
    qkv = torch.randn(3, 7 * 32, device=DEVICE)
    ours = torch.zeros(2, 2, 2, 16, 32, device=DEVICE)
    flash = torch.zeros(2, 2, 16, 2, 32, device=DEVICE)
    by_head = flash.transpose(2, 3)
    for k_pages, v_pages in (ours, by_head):
        triton_ops.write_qkv(qkv, positions, slots, rope, k_pages, v_pages)
    assert torch.equal(by_head, ours)
    assert ours.any(-1).sum() == 8  # 2 tokens with 2 heads of K and of V
    for k_pages, v_pages in (ours, by_head):
        triton_ops.write_kv(*qkv.view(3, 7, 32).split([2, 2, 3], 1)[:2], slots, k_pages, v_pages)
    assert torch.equal(by_head, ours)


@runs
@pytest.mark.skipif(
    not INTERPRETED and RUNS and torch.cuda.get_device_capability() < (8, 9),
    reason="float8 needs Ada or Hopper",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_cache(dtype):
    case = make_case([1, 9, 1], [40, 19, 9], block_size=32, dtype=dtype, device=DEVICE)
    backend = TritonAttention(case.spec, "fp8")
    assert backend.page_bytes() * dtype.itemsize == TritonAttention(case.spec).page_bytes()

    exact = case.expected(0)
    error = (
        case.run(backend, 0).float() - exact
    ).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < (
        0.15 if INTERPRETED else 0.06
    )  # 3 bits of mantissa: up to 1/16 of a number, 1/8 truncated

    for xs in (
        case.k,
        case.v,
    ):  # what the format holds exactly leaves no error but the compute type's
        xs[:] = [x.to(torch.float8_e4m3fn).to(dtype) for x in xs]
    torch.testing.assert_close(
        case.run(backend, 0).float(), case.expected(0), atol=2 * EPS[dtype], rtol=EPS[dtype]
    )

    huge = torch.full((11, 2, 64), 1e4, device=DEVICE, dtype=dtype)
    backend.store(0, huge, -huge)
    assert all(pages.float().abs().max() == 448 for pages in backend.cache)


@runs
def test_unknown_cache_type_is_refused_by_name():
    with pytest.raises(ValueError, match=r"kv_cache_dtype='int3'.*'auto' and 'fp8'"):
        TritonAttention(make_case([1], [1]).spec, "int3")


# Norms and activation


@runs
@pytest.mark.parametrize("size", [64, 576, 5120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_and_activation(size, dtype):
    torch.manual_seed(0)
    x, residual = (torch.randn(3, size, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.rand(size, device=DEVICE).to(dtype) + 0.5

    def norm(x, offset=0.0):
        factor = weight.double() + offset
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * factor

    def close(actual, expected):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, atol=EPS[dtype], rtol=3 * EPS[dtype])

    close(triton_ops.rms_norm(x, weight, 1e-6), norm(x.double()))
    once = triton_ops.rms_norm(x, weight, 1e-6, 1.0, round_once=True)
    close(once, norm(x.double(), 1.0))
    if dtype is torch.float16:  # the interpreter truncates to bfloat16
        assert (once != norm(x.double(), 1.0).to(dtype)).double().mean() < 0.01, "one rounding"
    close(
        triton_ops.rms_norm(x.view(3, 2, -1)[:, :1], weight[: size // 2], 1e-6)[:, 0],
        halved(x, weight),
    )
    gate, up = x.double(), residual.double()
    close(triton_ops.silu_and_mul(torch.cat((x, residual), 1)), gate * torch.sigmoid(gate) * up)
    total = x.double() + residual.double()
    normed, added = triton_ops.add_rms_norm(x, residual, weight, 1e-6)
    close(added, total)
    close(normed, norm(added.double()))
    normed, added = triton_ops.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6, 1.0, True)
    close(normed, norm(added.double(), 1.0))
    gelu = torch.nn.functional.gelu(x.double(), approximate="tanh")
    close(triton_ops.gelu_and_mul(torch.cat((x, residual), 1)), gelu * residual.double())


@runs
def test_gelu_of_numbers_of_any_size():
    x = torch.tensor([[-1e4, -90.0, -6.0, -1e-3, 0.0, 1e-3, 6.0, 1e4] + [1.0] * 8], device=DEVICE)
    expected = torch.nn.functional.gelu(x[:, :8].double(), approximate="tanh")
    out = triton_ops.gelu_and_mul(x).double()
    torch.testing.assert_close(out, expected, atol=1e-7, rtol=1e-6)


def halved(x, weight):
    """RMSNorm of the first half of each row: what a strided view of heads asks for."""
    half = x[:, : len(weight) // 2].double()
    return (
        half
        * torch.rsqrt(half.square().mean(-1, keepdim=True) + 1e-6)
        * weight[: len(weight) // 2].double()
    )


# Sampling


def tensor(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@runs
@pytest.mark.parametrize("vocab_size", [5, 4096, 10000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw_is_the_inverse_of_the_cumulative_distribution(vocab_size, dtype):
    rows = 12
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(rows, vocab_size, generator=generator) * 3).to(dtype)
    logits[:, 1] = float("-inf")
    temperature = torch.rand(rows, generator=generator) * 2 + 0.1
    u = torch.rand(rows, generator=generator)
    u[:2] = torch.tensor([0.0, 1 - 2**-24])
    tokens = triton_ops.draw(logits.to(DEVICE), temperature.to(DEVICE), u.to(DEVICE)).cpu()
    cumulative = (logits.double() / temperature[:, None].double()).softmax(-1).cumsum(-1)
    for row, token in enumerate(tokens.tolist()):
        below = cumulative[row, token - 1] if token else 0.0
        assert (
            below - 1e-5 <= u[row] <= cumulative[row, token] + 1e-5
        )  # float32 sums of probabilities
        assert token != 1


@runs
def test_draw_is_greedy_at_temperature_0_and_the_lowest_id_wins_a_tie():
    logits = torch.randn(3, 9000, device=DEVICE)
    logits[0, [4095, 4096, 8999]] = 50.0
    logits[1, [8999]] = 50.0
    logits[2, [0, 17]] = 50.0
    tokens = triton_ops.draw(
        logits, torch.zeros(3, device=DEVICE), torch.full((3,), 0.99, device=DEVICE)
    )
    assert tokens.tolist() == [4095, 8999, 0]


@runs
@pytest.mark.parametrize("vocab_size", [5, 5000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draw_gives_an_id_of_the_vocabulary_whatever_the_logits(vocab_size, temperature):
    """A row of NaN is lost, and its neighbours are not: an id beyond the embedding would end all work of the device."""
    logits = torch.full((3, vocab_size), float("nan"), device=DEVICE)
    logits[1] = torch.arange(vocab_size, device=DEVICE) * 100.0
    one = torch.ones(3, device=DEVICE)
    tokens = triton_ops.draw(logits, one * temperature, one * 0.999)
    assert ((tokens >= 0) & (tokens < vocab_size)).all()
    assert tokens[1] == vocab_size - 1


@runs
def test_draw_never_takes_what_a_threshold_or_an_infinity_excludes():
    logits = torch.full((9, 5000), float("-inf"), device=DEVICE)
    logits[:, [7, 4500, 4999]] = tensor([1.0, 2.0, 1.5])
    u = torch.linspace(0, 1 - 2**-24, 9, device=DEVICE)
    one = torch.ones(9, device=DEVICE)
    assert set(triton_ops.draw(logits, one, u).tolist()) == {7, 4500, 4999}
    assert set(triton_ops.draw(logits, one, u, one * 1.2).tolist()) == {4500, 4999}
    assert set(triton_ops.draw(logits, one, u, one * 2).tolist()) == {4500}


def kept_by_sorting(logits, temperature, top_k, top_p, min_p):
    """The definition, in float64 on one row: ids left by min-p, then top-k, then top-p; ties with the last are kept."""
    x = logits.double() / temperature
    alive = x >= x.max() + torch.log(torch.tensor(min_p).double())
    if 0 < top_k < len(x):
        alive &= (
            x >= x[alive].sort(descending=True).values[: max(1, min(top_k, int(alive.sum())))][-1]
        )
    if top_p < 1:
        ordered = x[alive].sort(descending=True).values
        cumulative = ordered.softmax(0).cumsum(0)
        alive &= x >= ordered[int((cumulative < top_p).sum().clamp(max=len(ordered) - 1))]
    return alive


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_filters_keep_what_sorting_keeps(dtype):
    generator = torch.Generator().manual_seed(1)
    asked = [
        *itertools.product([0, 1, 2, 5, 50, 2999], [1.0], [0.0]),
        *itertools.product([0], [0.001, 0.5, 0.9, 0.999], [0.0]),
        *itertools.product([0, 40], [1.0, 0.8], [0.05, 1.0]),
        (3000, 1.0, 0.0),
        (-1, 0.95, 0.0),
        (50, 0.9, 0.0),
    ]
    top_k, top_p, min_p = zip(*asked)
    logits = (torch.randn(len(asked), 3000, generator=generator) * 4).to(dtype)
    logits[:, :10] = float("-inf")
    temperature = torch.rand(len(asked), generator=generator) + 0.4
    threshold = triton_ops.filter_threshold(
        logits.to(DEVICE),
        temperature.to(DEVICE),
        tensor(top_k, torch.int32),
        tensor(top_p),
        tensor(min_p),
    ).cpu()
    for row, parameters in enumerate(asked):
        expected = kept_by_sorting(logits[row], temperature[row], *parameters)
        kept = logits[row].float() >= threshold[row]
        assert torch.equal(kept, expected), (parameters, int(kept.sum()), int(expected.sum()))


@runs
@pytest.mark.parametrize(
    "values", [[3.0], [0.0], [-2.5, -0.0, 0.0], [1e30, -1e30, 1e-30], [5.0, float("-inf")]]
)
def test_filters_on_ties_and_extremes(values):
    logits = tensor(values * 40)[None]
    for top_k, top_p in [(3, 1.0), (0, 0.3), (len(values) * 40, 0.3), (0, 1e-46)]:
        threshold = triton_ops.filter_threshold(
            logits, tensor([1.0]), tensor([top_k], torch.int32), tensor([top_p]), tensor([0.0])
        )
        assert torch.equal(logits >= threshold, logits == max(values))


@runs
def test_rows_without_a_filter_keep_every_logit():
    """Whatever the logits and the temperature are: greedy and padding rows have no filter."""
    logits = torch.randn(5, 3000).to(DEVICE)
    logits[1] = float("nan")
    threshold = triton_ops.filter_threshold(
        logits,
        tensor([0.0, 0.0, 0.7, 1.0, 1.0]),
        tensor([0, -1, 3000, 0, 2], torch.int32),
        tensor([1.0, 1.0, 1.0, 0.5, 1.0]),
        tensor([0.0] * 5),
    )
    assert threshold.isneginf().tolist() == [True, True, True, False, False]
    assert (logits[4] >= threshold[4]).sum() == 2


# Mixtures of experts


def experts_of(tokens: int, top_k: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, num_experts, generator=generator).argsort(-1)
    return ids[:, :top_k].int()


@runs
@pytest.mark.parametrize("num_experts", [4, 60])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routes_are_the_most_likely_experts(num_experts, renormalise, dtype):
    logits = torch.randn(9, num_experts, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[5] = 1.5  # a tie of all
    logits[6, 1:3] = 9  # a tie at the top
    logits[7] = torch.arange(num_experts) * 1e4  # the others have the probability 0
    weights, experts = moe_triton.route(logits.to(DEVICE), 3, renormalise)
    probs = logits.double().softmax(-1)
    wanted, ids = probs.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(experts.cpu(), ids[:, :3].int())
    wanted = wanted[:, :3]
    if renormalise:
        wanted = wanted / wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.cpu(), wanted.float(), atol=1e-7, rtol=1e-5)


@runs
def test_a_row_of_nan_is_routed_to_experts_that_exist():
    logits = torch.full((2, 5), float("nan"), device=DEVICE)
    _, experts = moe_triton.route(logits, 3, True)
    assert ((experts >= 0) & (experts < 5)).all()


@runs
@pytest.mark.parametrize(("first", "count"), [(0, 8), (2, 3), (4, 4)])
@pytest.mark.parametrize("tokens", [1, 50, 700])
def test_routes_are_sorted_by_expert(first, count, tokens):
    experts = experts_of(tokens, 3, 8)
    found = moe_triton.group_by_expert(experts.to(DEVICE), first, count)
    local = experts.flatten().long() - first
    local[(local < 0) | (local >= count)] = count
    routes = local.argsort(stable=True)
    counts = torch.bincount(local, minlength=count + 1)[:count]
    token_of_row, rows, offsets = (each.cpu() for each in found)
    assert torch.equal(token_of_row, (routes // 3).int())
    assert torch.equal(rows.flatten().long().argsort(), routes)
    assert offsets.tolist() == [0, *counts.cumsum(0).tolist()]


# Groups without rows, with few and with many; the last rows belong to no group.
GROUP_SIZES = [0, 1, 5, 0, 40, 2, 0]


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("features", "depth", "sizes", "rest"),
    [
        (96, 64, GROUP_SIZES, 3),
        (40, 144, GROUP_SIZES, 0),
        (70, 32, [150, 0, 90], 20),
        (16, 32, [0, 0], 5),
        (16, 32, [1], 0),
    ],
)
def test_a_grouped_product(dtype, features, depth, sizes, rest):
    generator = torch.Generator().manual_seed(0)
    rows = sum(sizes) + rest
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    weight = torch.randn(len(sizes) * features, depth, generator=generator).to(dtype)
    bias = torch.randn(len(sizes) * features, generator=generator).to(dtype)
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    for added in (None, bias):
        wanted = torch.zeros(rows, features, dtype=torch.float64)
        for group, start in enumerate(offsets[:-1].tolist()):
            own = slice(start, start + sizes[group])
            matrix = slice(group * features, (group + 1) * features)
            wanted[own] = x[own].double() @ weight[matrix].double().T
            if added is not None:
                wanted[own] += added[matrix].double()
        on_device = (x.to(DEVICE), weight.to(DEVICE), offsets.to(DEVICE))
        found = moe_triton.grouped_linear(*on_device, None if added is None else added.to(DEVICE))
        assert found.dtype is dtype
        atol = EPS[dtype] * depth**0.5
        torch.testing.assert_close(found.cpu().double(), wanted, atol=atol, rtol=2 * EPS[dtype])
        assert not found[sum(sizes) :].any()


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weighted_sum_of_a_token_s_rows(dtype):
    y = torch.randn(15, 1100).to(dtype)
    rows = torch.randperm(15).int().view(5, 3)
    weights = torch.rand(5, 3)
    found = moe_triton.combine(y.to(DEVICE), rows.to(DEVICE), weights.to(DEVICE)).cpu()
    wanted = (weights.double()[..., None] * y.double()[rows.long()]).sum(1)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), wanted, atol=3 * EPS[dtype], rtol=EPS[dtype])


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clamped_swiglu(dtype):
    x = (torch.randn(3, 2200) * 5).to(dtype)
    found = moe_triton.clamped_swiglu(x.to(DEVICE), 1.702, 7.0).cpu()
    gate, up = x.double().chunk(2, -1)
    gate = gate.clamp(max=7.0)
    wanted = gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), wanted, atol=EPS[dtype], rtol=2 * EPS[dtype])


# What stands beside the kernels


@runs
def test_the_bandwidth_measurement_runs():
    from gpu.attention_bandwidth import decode_bandwidth

    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    spec = {"heads": (2, 1), "head_dim": 32, "dtype": dtype, "device": DEVICE}
    assert decode_bandwidth(2, 40, 16, total=0, **spec) > 0
    assert decode_bandwidth(2, 40, 16, total=0, **spec, shape={"TILE": 32, "num_stages": 2}) > 0


@runs
def test_the_backend_says_what_it_cannot_run():
    assert TritonAttention.refuses(make_case([1], [1], device=DEVICE).spec) is None
    assert "256, not 512" in TritonAttention.refuses(
        make_case([1], [1], head_dim=512, device=DEVICE).spec
    )
    sizes = make_case([1], [1], value_dim=32, dtype=torch.float16, device=DEVICE).spec
    assert TritonAttention.refuses(sizes) is None
