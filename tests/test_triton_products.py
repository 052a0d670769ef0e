"""Products of few rows against float64: on a GPU where there is one, else under Triton's interpreter.

Interpreting is decided when triton is first imported, so one test runs this file again in a process of its own. There
a conversion to bfloat16 truncates where a GPU rounds: tolerances are one unit in the last place of the type.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
pytest.importorskip("triton", reason="no triton for this platform")

if RUNS:
    from nanovllm.kernels import gpu_table, linear_triton, triton_ops
    from nanovllm.kernels.choice import KernelChoice, kernel_choice

EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = list(EPS)


def runs(test):
    """Marks a test of kernels: of the GPU suite, but for the process that interprets."""
    test = pytest.mark.skipif(
        not RUNS, reason="no CUDA device; test_under_the_interpreter runs it"
    )(test)
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.mark.skipif(RUNS, reason="this process runs the kernels itself")
def test_under_the_interpreter():
    options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist")
    command = [sys.executable, "-m", "pytest", *options, __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.fixture(autouse=True)
def a_large_gpu(monkeypatch):
    """132 multiprocessors, so that products are split."""
    if RUNS:
        found = gpu_table.device_properties(torch.device(DEVICE))
        gpu = gpu_table.DeviceProperties(found.capability, 132)
        monkeypatch.setattr(gpu_table, "device_properties", lambda device: gpu)


def case(rows, features, depth, dtype, bias=True):
    """(x, weight, bias, the product in float64)."""
    generator = torch.Generator().manual_seed(rows + features + depth)
    x = torch.randn(rows, depth, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(features, depth, generator=generator) / depth**0.5).to(DEVICE, dtype)
    offsets = torch.randn(features, generator=generator).to(DEVICE, dtype) if bias else None
    product = x.double() @ weight.double().T
    return x, weight, offsets, product if offsets is None else product + offsets.double()


def assert_near(out, expected):
    eps = EPS[out.dtype]
    torch.testing.assert_close(out.double(), expected, atol=2 * eps, rtol=eps)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "depth"),
    [(1, 64, 512), (3, 100, 640), (17, 40, 333), (33, 1, 65), (65, 130, 256), (256, 65, 129)],
)
def test_linear_equals_the_product_in_float64(rows, features, depth, dtype):
    x, weight, bias, expected = case(rows, features, depth, dtype)
    assert_near(linear_triton.linear(x, weight, bias), expected)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "depth"), [(1, 32, 256), (5, 50, 100), (40, 7, 333), (129, 33, 64)]
)
def test_swiglu_equals_silu_of_the_gate_times_the_rest(rows, features, depth, dtype):
    x, weight, bias, product = case(rows, 2 * features, depth, dtype)
    gate, up = product.chunk(2, dim=1)
    out = linear_triton.swiglu(x, weight, bias)
    assert out.shape == (rows, features)
    # Three roundings: of the product, of the activation and of the result.
    eps = EPS[dtype]
    expected = gate * gate.sigmoid() * up
    torch.testing.assert_close(out.double(), expected, atol=6 * eps, rtol=6 * eps)


@runs
def test_rows_of_any_stride_and_no_bias():
    x, weight, _, expected = case(4, 96, 256, torch.float16, bias=False)
    wide = torch.full((4, 300), float("nan"), dtype=torch.float16, device=DEVICE)
    wide[:, :256] = x
    assert_near(linear_triton.linear(wide[:, :256], weight, None), expected)
    gate, up = expected.chunk(2, dim=1)
    out = linear_triton.swiglu(wide[:, :256], weight, None)
    torch.testing.assert_close(out.double(), gate * gate.sigmoid() * up, atol=6e-3, rtol=6e-3)


@runs
def test_products_of_one_matrix_follow_each_other():
    """The counters are 0 after each product, and parts of an earlier product are not read."""
    _, weight, bias, _ = case(1, 64, 1024, torch.float16)
    for rows in (40, 1, 2, 17):
        x = torch.randn(rows, 1024, device=DEVICE, dtype=torch.float16)
        expected = x.double() @ weight.double().T + bias.double()
        assert_near(linear_triton.linear(x, weight, bias), expected)
        assert not linear_triton.counters(weight).any()


@runs
def test_the_counters_go_with_the_matrix():
    x, weight, *_ = case(1, 64, 512, torch.float16)
    before = len(linear_triton.ARRIVED)
    linear_triton.linear(x, weight, None)
    assert len(linear_triton.ARRIVED) == before + 1
    del weight
    assert len(linear_triton.ARRIVED) == before


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter runs programs one after another")
def test_the_order_of_programs_does_not_change_a_bit(monkeypatch):
    """A GPU runs programs in any order: any program of a tile may finish last and add the parts."""
    from triton.runtime.interpreter import interpreter_builder

    x, weight, bias, expected = case(2, 64, 1024, torch.float16)
    set_index = interpreter_builder.set_grid_idx
    outs = []
    for seed in range(5):

        def set_other(x, y, z, seed=seed):
            splits = interpreter_builder.grid_dim[2]
            assert splits > 3
            places = torch.randperm(splits, generator=torch.manual_seed(seed)).tolist()
            set_index(x, y, places[z])

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_other)
        outs.append(linear_triton.linear(x, weight, bias))
    assert_near(outs[0], expected)
    assert all(torch.equal(out, outs[0]) for out in outs)


@runs
def test_kernels_that_start_early_give_the_same_bits():
    """Each of these kernels reads what the kernel before it writes."""
    x, gate_up, *_ = case(9, 512, 256, torch.float16, bias=False)
    down = case(9, 256, 256, torch.float16)[1]

    def run(names):
        hidden = x.clone()
        with kernel_choice(KernelChoice(without=frozenset(names))):
            for _ in range(10 if DEVICE == "cuda" else 2):
                inner = linear_triton.swiglu(
                    triton_ops.rms_norm(hidden, down[0], 1e-6), gate_up, None
                )
                triton_ops.add_rms_norm(linear_triton.linear(inner, down, None), hidden, x[0], 1e-6)
        return hidden

    assert torch.equal(run(()), run(("pdl",)))


@runs
@pytest.mark.parametrize("blocks", [1, 2, 3, 16, 47])
@pytest.mark.parametrize("tiles", [1, 5, 16, 60, 132, 500])
def test_every_program_of_a_tile_has_work(tiles, blocks):
    gpu = gpu_table.DeviceProperties((9, 0), 132)
    splits, share = gpu_table.split_depth(gpu, tiles, blocks)
    assert (splits - 1) * share < blocks <= splits * share
    assert splits == 1 or tiles * splits <= 132
    assert splits == 1 or tiles <= linear_triton.COUNTERS
