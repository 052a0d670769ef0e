"""The C++ kernels against float64 formulas and the written-out attention, and how their library is built."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from attention_reference import make_case

from nanovllm import kernels
from nanovllm.attention.cpu_backend import CpuAttention
from nanovllm.kernels import cpu, library
from nanovllm.kernels.rope import Rope

needs_library = pytest.mark.skipif(
    cpu.load() is None, reason="cpu.cpp does not build here (no C++ compiler)"
)
# A machine with AVX-512 runs what a machine without it runs, too.
LEVELS = ["native", "avx2"] if "avx512f" in library.cpu_features().split() else ["native"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of a result's scale; the float32 rounding of sums, or the rounding of the result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual, expected, dtype, scale=1.0):
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), expected.double(), atol=TOLERANCE[dtype] * scale, rtol=TOLERANCE[dtype]
    )


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def forget_the_library() -> None:
    for cached in (library.load, cpu.load, cpu.kernel, cpu.panel, cpu.replay_function):
        cached.cache_clear()


@pytest.fixture(scope="class", params=LEVELS)
def instructions(request):
    """The kernels of this class's tests may use these instructions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOVLLM_CPU_ISA", request.param)
        forget_the_library()
        yield request.param
    forget_the_library()


on_every_cpu = pytest.mark.usefixtures("instructions")


@needs_library
@on_every_cpu
class TestAttention:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("heads", "head_dim", "block_size"),
        [
            ((9, 3), 64, 16),
            ((4, 4), 80, 8),
            ((14, 2), 96, 32),
            ((8, 1), 128, 16),
            ((2, 1), 256, 2),
            ((32, 1), 16, 128),
        ],
    )
    def test_ragged_batches_of_prefill_chunks_and_decodes(self, dtype, heads, head_dim, block_size):
        queries, contexts = [1, 5, 1, 33, 2, 1], [1, 5, 77, 150, 200, 257]
        for window in (None, 5, 130):
            case = make_case(
                queries,
                contexts,
                heads=heads,
                head_dim=head_dim,
                block_size=block_size,
                windows=(None, window),
                dtype=dtype,
            )
            assert_close(case.run(CpuAttention(case.spec), 1), case.expected(1), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("words", "block_size"),
        [
            ({"softcap": 2.0, "head_dim": 64}, 16),
            ({"sinks": True, "head_dim": 64}, 8),
            ({"value_dim": 40, "head_dim": 72}, 16),
            ({"value_dim": 97, "head_dim": 34, "softcap": 30.0}, 2),
            ({"value_dim": 512, "head_dim": 24, "sinks": True}, 16),
            ({"value_dim": 128, "head_dim": 512, "softcap": 5.0, "sinks": True}, 32),
        ],
    )
    def test_softcap_sinks_and_sizes_of_heads(self, dtype, words, block_size):
        for window in (None, 5):
            case = make_case(
                [1, 5, 30],
                [140, 5, 77],
                heads=(6, 2),
                block_size=block_size,
                windows=(window,),
                dtype=dtype,
                **words,
            )
            assert_close(case.run(CpuAttention(case.spec), 0), case.expected(0), dtype)

    def test_a_softcap_is_exact_for_small_and_for_large_scores(self):
        for scale in (1e-3, 0.1, 1.0, 30.0):
            case = make_case([9], [300], softcap=0.7)
            case.q[0] *= scale
            assert_close(case.run(CpuAttention(case.spec), 0), case.expected(0), torch.float32)

    def test_a_sink_may_be_far_from_the_scores(self):
        case = make_case([1, 40], [300, 40], sinks=True)
        case.sinks = torch.tensor([-1e4, 1e4, 60.0, -60.0])
        assert_close(case.run(CpuAttention(case.spec), 0), case.expected(0), torch.float32)

    def test_layers_of_different_shapes(self):
        lengths = ([1, 20], [50, 20])
        small = make_case(*lengths, heads=(4, 4), head_dim=24, value_dim=20, sinks=True)
        large = make_case(*lengths, heads=(6, 2), head_dim=96, softcap=3.0, windows=(7,))
        layers = (*small.spec.layers, *large.spec.layers)
        backend = CpuAttention(replace(small.spec, layers=layers))
        assert_close(small.run(backend, 0), small.expected(0), torch.float32)
        assert_close(large.run(backend, 1), large.expected(0), torch.float32)
        taken = sum(pages.nbytes for pages in backend.cache)
        assert backend.page_bytes() * large.num_blocks == taken

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("words", [{}, {"softcap": 3.0, "sinks": True, "value_dim": 40}])
    def test_a_row_is_the_same_alone_in_company_in_chunks_and_with_any_number_of_threads(
        self, dtype, words
    ):
        alone = make_case([700], [700], heads=(6, 2), dtype=dtype, **words)
        whole = alone.run(CpuAttention(alone.spec), 0)
        last = make_case([1], [700], heads=(6, 2), dtype=dtype, **words)
        many = make_case([1] * 9 + [30], [700] * 9 + [650], heads=(6, 2), dtype=dtype, **words)
        for case in (last, many):
            case.sinks = alone.sinks
            case.k[0], case.v[0], case.q[0] = alone.k[0], alone.v[0], alone.q[0][-1:]
        threads = torch.get_num_threads()
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                for case in (last, many):
                    assert torch.equal(
                        bits(case.run(CpuAttention(case.spec), 0)[0]), bits(whole[-1])
                    )
        finally:
            torch.set_num_threads(threads)

    def test_what_lies_past_the_context_may_be_infinite(self):
        case = make_case([1, 3], [77, 19], dtype=torch.bfloat16)
        backend = CpuAttention(case.spec)
        before = case.run(backend, 0)
        dirty = backend.cache[0].view(-1)
        stale = dirty == 0  # what nothing was written to
        dirty[stale] = float("inf")
        assert stale.any()
        assert torch.equal(backend.attend(0, torch.cat(case.q)), before)

    def test_slot_minus_one_writes_nowhere(self):
        case = make_case([16, 1], [16, 20])
        backend = CpuAttention(case.spec)
        case.run(backend, 0)
        before = backend.cache[0].clone()
        backend.meta.slot_mapping.fill_(-1)
        backend.store(0, torch.full((17, 2, 64), 9.0), torch.full((17, 2, 64), 9.0))
        assert torch.equal(backend.cache[0], before)

    def test_offsets_beyond_31_bits(self):
        case = make_case([1], [40], heads=(1, 1), head_dim=256, block_size=32, dtype=torch.float16)
        table = case.block_tables.clone()
        table[0, :2] = torch.tensor(
            [300_000, 299_999]
        )  # at 4.9e9 elements; untouched pages take no memory
        case.block_tables, case.num_blocks = table, 300_001
        assert_close(case.run(CpuAttention(case.spec), 0), case.expected(0), torch.float16)

    def test_heads_may_lie_apart_when_they_are_stored(self):
        case = make_case([16, 1], [16, 20], value_dim=40)
        contiguous, apart = CpuAttention(case.spec), CpuAttention(case.spec)
        case.run(contiguous, 0)
        case.k = [k.transpose(0, 1).contiguous().transpose(0, 1) for k in case.k]
        case.run(apart, 0)
        k = torch.cat(case.k)[:17].transpose(0, 1).contiguous().transpose(0, 1)
        v = torch.cat((k, k), 2)[..., 64:104]
        contiguous.store(0, k.contiguous(), v.contiguous())
        apart.store(0, k, v)
        assert k.stride() != k.contiguous().stride()
        assert torch.equal(contiguous.cache[0], apart.cache[0])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("eps", [None, 1e-6])
    @pytest.mark.parametrize(
        ("head_dim", "rotary_dim", "offset"),
        [(64, 64, 0.0), (80, 80, 1.0), (128, 128, 0.0), (72, 20, 0.0), (48, 0, 1.0)],
    )
    def test_write_is_norm_and_rope_and_store(self, dtype, eps, head_dim, rotary_dim, offset):
        heads = (6, 2)
        case = make_case([1, 40], [30, 40], heads=heads, head_dim=head_dim, dtype=dtype)
        angles = torch.rand(64, rotary_dim // 2) * 6
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        rope = Rope(*heads, head_dim, cos_sin)
        if eps is not None:
            weight = normal(head_dim, dtype=dtype, seed=3)
            rope = Rope(*heads, head_dim, cos_sin, weight, weight, eps, offset, offset != 0)
        fused, plain = CpuAttention(case.spec), CpuAttention(case.spec)
        qkv = normal(41, 10 * head_dim, dtype=dtype)
        meta = case.metadata([29, 0], [30, 40])
        for backend in (fused, plain):
            backend.allocate(case.num_blocks)
            backend.begin(meta)
        wide = Rope(
            *(field.double() if isinstance(field, torch.Tensor) else field for field in rope)
        )
        q, k, v = kernels.qk_norm_rope(qkv.double(), meta.positions, wide)
        plain.store(0, k.to(dtype), v.to(dtype))
        assert_close(fused.write(0, qkv, rope), q, dtype, scale=4)
        assert_close(fused.cache[0], plain.cache[0], dtype, scale=4)

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"head_dim": 71}, "head_dim=71"),
            ({"head_dim": 514}, "head_dim=514"),
            ({"value_dim": 513}, "value_dim=513"),
            ({"block_size": 5}, "block_size=5"),
        ],
    )
    def test_refuses_by_name(self, change, word):
        spec = make_case([1], [1], **change).spec
        assert word in CpuAttention.refuses(spec)
        with pytest.raises(ValueError, match=word):
            CpuAttention(spec)


def in_panels(weight: torch.Tensor) -> torch.Tensor:
    copy = weight.clone()
    cpu.to_panels(copy)
    return copy


@needs_library
@on_every_cpu
class TestLinear:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("depth", "cols"),
        [(576, 192), (1536, 40), (33, 17), (1, 1), (34, 17), (9000, 5), (256, 65)],
    )
    @pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 13, 64])
    def test_product_and_bias(self, dtype, depth, cols, rows):
        x, weight, bias = (
            normal(rows, depth, dtype=dtype),
            normal(cols, depth, dtype=dtype, seed=1),
            normal(cols, dtype=dtype),
        )
        expected, scale = x.double() @ weight.double().T, depth**0.5
        assert_close(kernels.linear(x, weight, None), expected, dtype, scale=scale)
        assert_close(cpu.linear(x, weight, bias), expected + bias.double(), dtype, scale=scale)
        assert cpu.fits_panels(depth, dtype) or depth % 2, (
            "only where two neighbours meet in one step, an odd depth does not"
        )
        if cpu.fits_panels(depth, dtype):
            panels = in_panels(weight)
            assert_close(cpu.linear_panels(x, panels, None), expected, dtype, scale=scale)
            assert_close(
                cpu.linear_panels(x, panels, bias), expected + bias.double(), dtype, scale=scale
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("cols", "depth"), [(192, 64), (40, 6), (17, 2), (65, 100)])
    def test_panels_hold_the_same_rows_and_become_rows_again(self, dtype, cols, depth):
        weight = normal(cols, depth, dtype=dtype)
        panels = in_panels(weight)
        assert torch.equal(panels, weight) is (cols < cpu.panel(dtype)[0])
        ids = torch.tensor([0, cols - 1, cols // 2, 0, 3])
        assert torch.equal(cpu.embedding_panels(ids, panels), weight[ids])
        assert torch.equal(kernels.embedding(ids, weight), weight[ids])
        cpu.to_rows(panels)
        assert torch.equal(panels, weight)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_id_outside_the_weight_gives_zeros(self, dtype):
        weight = normal(40, 64, dtype=dtype)
        ids = torch.tensor([-1, 40, 2**40, -(2**62)])
        for rows in (cpu.embedding(ids, weight), cpu.embedding_panels(ids, in_panels(weight))):
            assert torch.equal(rows, torch.zeros(4, 64, dtype=dtype))

    def test_a_dtype_without_kernels_has_no_panels(self):
        assert not cpu.fits_panels(64, torch.float64)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("depth", [5000, 333])
    def test_a_row_is_the_same_alone_and_in_company(self, dtype, depth):
        x, weight = normal(100, depth, dtype=dtype), normal(50, depth, dtype=dtype, seed=1)
        products = [(cpu.linear, weight)]
        if cpu.fits_panels(depth, dtype):
            products.append((cpu.linear_panels, in_panels(weight)))
        for product, matrix in products:
            together = product(x, matrix, None)
            for first, last in ((0, 1), (3, 4), (57, 58), (99, 100), (10, 17), (20, 60)):
                assert torch.equal(
                    bits(product(x[first:last], matrix, None)), bits(together[first:last])
                )

    def test_rows_may_lie_apart_and_there_may_be_none(self):
        x, weight = normal(10, 96, dtype=torch.float32), normal(40, 32, dtype=torch.float32)
        panels, expected = in_panels(weight), x[::3, 32:64] @ weight.T
        assert_close(
            cpu.linear_panels(x[::3, 32:64], panels, None), expected, torch.float32, scale=6
        )
        assert cpu.linear_panels(x[:0, :32], panels, None).shape == (0, 40)
        assert_close(
            cpu.linear_panels(normal(32, 7, dtype=torch.float32).T, panels, None),
            normal(32, 7, dtype=torch.float32).T @ weight.T,
            torch.float32,
            scale=6,
        )
        assert_close(
            kernels.linear(x.T[:, ::2], weight[:, :5], None),
            x.T[:, ::2] @ weight[:, :5].T,
            torch.float32,
            6,
        )


@needs_library
@on_every_cpu
class TestNormAndActivation:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("offset", "once"), [(0.0, False), (1.0, True), (0.0, True)])
    @pytest.mark.parametrize(("rows", "size"), [(1, 576), (3, 77), (130, 1024), (2, 5), (0, 16)])
    def test_rms_norm_alone_and_after_an_addition(self, dtype, rows, size, offset, once):
        x, residual, weight = (
            normal(*s, dtype=dtype, seed=i)
            for i, s in enumerate([(rows, size), (rows, size), (size,)])
        )

        def reference(x):
            quotient = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
            return (weight.double() + offset) * (quotient if once else quotient.to(dtype))

        alone = kernels.rms_norm(x, weight, 1e-5, offset, once)
        assert_close(alone, reference(x), dtype)
        if once and dtype is not torch.float32:
            exact = reference(x).to(dtype)
            different = (alone != exact).double()
            assert different.sum() <= 1 + 0.01 * different.numel(), "one rounding"
        if offset == 0:
            wide = torch.cat((residual, x, residual), 1)  # [rows, 3 size]
            assert torch.equal(
                kernels.rms_norm_in_place(wide[:, size : 2 * size], weight, 1e-5, once), alone
            )
            assert torch.equal(wide, torch.cat((residual, alone, residual), 1))
        total = x + residual
        how = (1e-5, offset, once)
        normed, summed = kernels.add_rms_norm(x.clone(), residual.clone(), weight, *how)
        assert torch.equal(summed, total)
        assert_close(normed, reference(total), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rows", "size"), [(1, 1536), (3, 77), (40, 1024)])
    def test_silu_and_gelu_and_mul(self, dtype, rows, size):
        x = normal(rows, 2 * size, dtype=dtype) * 10
        x[0, :4] = torch.tensor([-1e4, 1e4, -88.0, 0.0], dtype=dtype)
        gate, up = x.double().chunk(2, -1)
        assert_close(cpu.silu_and_mul(x), (gate * gate.sigmoid() * up).to(dtype), dtype, scale=10)
        gelu = gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        assert_close(kernels.gelu_and_mul(x), (gelu * up).to(dtype), dtype, scale=10)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rows", "size"), [(1, 1536), (3, 77), (40, 1024), (0, 5)])
    def test_add_and_scale(self, dtype, rows, size):
        x, y = normal(rows, size, dtype=dtype), normal(rows, size, dtype=dtype, seed=1)
        assert torch.equal(kernels.add(x.clone(), y), x + y)
        assert torch.equal(kernels.scale(x.clone(), 0.7), x * 0.7)
        for operation, expected in ((kernels.add, x + y), (kernels.scale, x * 0.7)):
            apart = x.clone().T.contiguous().T
            operand = y if operation is kernels.add else 0.7
            assert torch.equal(operation(apart, operand), expected)


@needs_library
@on_every_cpu
class TestSampling:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("vocab", [1, 7, 1000, 1024, 5003])
    def test_inverse_cdf_in_vocabulary_order(self, dtype, vocab):
        rows = 60
        logits, temperature = normal(rows, vocab, dtype=dtype) * 4, torch.linspace(0.2, 3, rows)
        logits[1::2, ::3] = float("-inf") if vocab > 1 else 0
        u = torch.rand(rows, generator=torch.Generator().manual_seed(1))
        u[:2], u[2:4] = 0, 1 - 2**-24
        tokens = kernels.draw(logits, temperature, u)
        weights = (logits.double() / temperature.double()[:, None]).softmax(-1)
        total = weights.cumsum(-1)
        got = tokens[:, None]
        assert (weights.gather(1, got) > 0).all()
        assert (total.gather(1, got)[:, 0] > u - 1e-6).all()
        assert ((total - weights).gather(1, got)[:, 0] <= u + 1e-6).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_temperature_0_takes_the_first_of_the_largest(self, dtype):
        logits = normal(20, 3000, dtype=dtype).round()
        tokens = cpu.draw(logits, torch.zeros(20), torch.rand(20))
        assert tokens.tolist() == [row.index(max(row)) for row in logits.tolist()]

    def test_a_row_is_the_same_alone_in_company_and_with_any_number_of_threads(self):
        logits, temperature, u = (
            normal(40, 4000, dtype=torch.float32),
            torch.rand(40),
            torch.rand(40),
        )
        together = cpu.draw(logits, temperature, u)
        alone = [
            cpu.draw(logits[i : i + 1], temperature[i : i + 1], u[i : i + 1]) for i in range(40)
        ]
        assert torch.equal(torch.cat(alone), together)

    def test_frequencies_follow_the_softmax(self):
        logits = torch.tensor([0.0, 1.0, -2.0, 0.5]).repeat(20000, 1)
        u = torch.rand(20000, generator=torch.Generator().manual_seed(5))
        counts = torch.bincount(cpu.draw(logits, torch.full((20000,), 0.7), u), minlength=4)
        expected = (logits[0] / 0.7).softmax(-1) * 20000
        assert (
            (counts - expected).square() / expected
        ).sum() < 16.3  # chi-square, 3 degrees of freedom: 1 in 1000


LINEAR = "import torch; from nanovllm import kernels; print(kernels.linear(torch.ones(2, 3), torch.ones(1, 3), None).tolist())"


def start(cache, **environment):
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", **environment}
    code = f"import logging; logging.basicConfig(level=logging.INFO); {LINEAR}"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=pipe, stderr=pipe, text=True
    )


@needs_library
def test_two_processes_build_at_once_and_a_third_finds_it_built(tmp_path):
    for process in [start(tmp_path), start(tmp_path)]:
        out, err = process.communicate(timeout=120)
        assert (out.strip(), process.returncode) == ("[[3.0], [3.0]]", 0), err
    assert [path.suffix for path in (tmp_path / "nanovllm").iterdir()] == [".so"]
    out, err = start(tmp_path).communicate(timeout=60)
    assert out.strip() == "[[3.0], [3.0]]"
    assert "building" not in err


@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler"])
def test_without_a_working_compiler_torch_computes_and_one_line_says_so(tmp_path, compiler):
    out, err = start(tmp_path, CXX=compiler).communicate(timeout=60)
    assert out.strip() == "[[3.0], [3.0]]"
    assert err.count("torch's own kernels") == 1
    assert compiler in err


@needs_library
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc/self/maps")
def test_there_is_one_openmp_runtime_and_no_thread_beyond_torchs():
    x, weight = torch.ones(64, 576), torch.ones(576, 576)
    x @ weight
    cpu.to_panels(weight)
    before = len(os.listdir("/proc/self/task"))
    cpu.linear_panels(x, weight, None)
    assert len(os.listdir("/proc/self/task")) == before
    with open("/proc/self/maps") as maps:
        files = {line.split()[-1] for line in maps}
    runtimes = [file for file in files if re.match(r"lib(g|i)?omp", os.path.basename(file))]
    assert len(runtimes) == 1


def test_a_dtype_without_kernels_is_left_to_torch():
    x = torch.ones(2, 3, dtype=torch.float64)
    assert cpu.linear(x, x, None) is None
    assert torch.equal(kernels.linear(x, x, None), x @ x.T)


def test_unknown_instructions_are_refused_by_a_sentence(monkeypatch):
    monkeypatch.setenv("NANOVLLM_CPU_ISA", "avx3")
    with pytest.raises(
        ValueError,
        match="NANOVLLM_CPU_ISA='avx3' is not known; accepted are native, avx512, avxvnni, avx2",
    ):
        library.build(cpu.SOURCE)
