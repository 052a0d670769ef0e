"""Every kernel, as its caller launches it, compiled ahead of time: no spills, shared memory that fits, 16-byte accesses.

All kernels are compiled for an H100, the main ones for each kind of GPU in `gpu_table`, and all for an MI300. No GPU
takes part: see kernel_compiler.py. tests/gpu/compile_matrix.py prints the whole table.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="no triton for this platform")

from kernel_compiler import (  # noqa: E402
    MULTIPROCESSORS,
    RESOURCES,
    NoDevice,
    NoInstinct,
    attend_once,
    compiling_for,
    usage,
)
from torch._subclasses.fake_tensor import (  # noqa: E402
    DataDependentOutputException,
    FakeTensorMode,
)
from triton.runtime.driver import driver  # noqa: E402

from nanovllm.kernels import linear_triton, moe_triton, triton_ops  # noqa: E402
from nanovllm.kernels.choice import KernelChoice, kernel_choice  # noqa: E402
from nanovllm.kernels.gpu_table import gpu_kind  # noqa: E402
from nanovllm.kernels.rope import Rope  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
    pytest.mark.skipif(
        tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6),
        reason="tile sizes suit the compiler of triton 3.6",
    ),
    pytest.mark.skipif(not RESOURCES.exists(), reason="this triton carries no cuobjdump"),
]

# Bytes a thread. The decode kernel for 10.0 keeps a few numbers of a segment on the stack, and
# reads none of them in its loop over keys.
ALLOWED_SPILL = {100: 32}


@pytest.fixture
def compiled():
    """The list to which every launch adds its kernel, compiled for an H100."""
    with compiling_for(NoDevice(90)) as kernels:
        yield kernels


def check(kernel) -> str:
    """Asserts that no register is spilled and that shared memory fits; returns the PTX."""
    capability = driver.active.get_current_target().arch
    found = usage(kernel)
    print(capability, found)
    assert found.spilled <= ALLOWED_SPILL.get(capability, 0)
    assert found.shared <= gpu_kind(divmod(capability, 10)).program_memory * 1024
    return kernel.asm["ptx"]


def copies(ptx: str) -> set[int]:
    """Sizes in bytes of the asynchronous copies from global to shared memory."""
    return {
        int(size, 0) for size in re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?, (0x\w+)", ptx)
    }


def assert_wide(ptx: str) -> None:
    """Tensors travel in 16-byte vectors; a scalar may be loaded alone."""
    loads = re.findall(r"ld\.global\S*?\.(v\d)?\.?[bfu](\d+)", ptx)
    assert ("v4", "32") in loads or ("v2", "64") in loads, set(loads)


SHAPES = [  # heads, head_dim, block_size, window, dtype, kv_cache_dtype
    ((16, 8), 128, 64, None, torch.bfloat16, "auto"),  # Qwen3-0.6B
    ((32, 8), 128, 16, None, torch.bfloat16, "auto"),  # Qwen3-8B, small pages
    ((28, 4), 128, 256, None, torch.float16, "auto"),  # Qwen2-7B
    ((9, 3), 64, 16, None, torch.bfloat16, "auto"),  # SmolLM2-135M
    ((8, 4), 256, 64, 512, torch.bfloat16, "auto"),  # Gemma
    ((32, 32), 96, 16, 2047, torch.bfloat16, "auto"),  # Phi-3-mini
    ((32, 32), 80, 64, None, torch.float16, "auto"),  # Phi-2
    ((16, 8), 128, 64, None, torch.float32, "auto"),
    ((4, 2), 8, 16, None, torch.float32, "auto"),  # a test's model
    ((16, 8), 128, 64, None, torch.bfloat16, "fp8"),
    ((32, 8), 128, 16, None, torch.bfloat16, "fp8"),
    ((9, 3), 64, 64, None, torch.bfloat16, "fp8"),
    ((8, 4), 256, 64, 512, torch.bfloat16, "fp8"),
]


WORDS = [  # heads, head_dim, block_size, window, dtype, kv_cache_dtype, what `make_case` gets
    ((64, 8), 64, 16, 128, torch.bfloat16, "auto", {"sinks": True}),  # gpt-oss
    ((8, 4), 256, 64, 4096, torch.bfloat16, "auto", {"softcap": 50.0}),  # Gemma 2, 2B
    ((8, 4), 256, 16, None, torch.bfloat16, "fp8", {"softcap": 50.0}),
    ((16, 16), 192, 64, None, torch.bfloat16, "auto", {"value_dim": 128}),  # DeepSeek-V2
    ((4, 2), 64, 16, None, torch.float32, "auto", {"softcap": 50.0, "sinks": True}),
]


@pytest.mark.parametrize(("heads", "dim", "page", "window", "dtype", "cache", "words"), WORDS)
def test_attention_with_words(compiled, heads, dim, page, window, dtype, cache, words):
    attend_once(heads, dim, page, window, dtype, cache, **words)
    _, decode, prefill = compiled
    for kernel in (prefill, decode):
        check(kernel)


@pytest.mark.parametrize(("heads", "dim", "page", "window", "dtype", "cache"), SHAPES)
def test_attention(compiled, heads, dim, page, window, dtype, cache):
    backend = attend_once(heads, dim, page, window, dtype, cache)
    plan, decode, prefill = compiled
    check(plan)
    for kernel in (prefill, decode):
        ptx = check(kernel)
        if (
            kernel.metadata.num_stages > 2
        ):  # K and V of the next tile are on their way while one is worked on
            assert max(int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)) >= 2
        assert 16 in copies(ptx) or ((cache == "fp8" or dim == 8) and copies(ptx) == {8})
        if dtype != torch.float32:
            warp_groups = kernel is prefill and backend.launches[0].prefill["BLOCK_M"] >= 64
            assert ("wgmma" if warp_groups else "mma.sync") in ptx


# 8.9 has the tiles of 8.6, and float8.
OTHER_GPUS = [(75, "auto"), (80, "auto"), (86, "auto"), (89, "fp8"), (100, "auto"), (120, "auto")]


@pytest.mark.parametrize(("capability", "cache"), OTHER_GPUS)
def test_attention_fits_every_gpu(capability, cache):
    sizes = [((16, 8), 128), ((8, 4), 256)]  # Qwen3-0.6B, Gemma
    for heads, dim in sizes[:1] if cache == "fp8" else sizes:
        assert_attention_fits(capability, heads, dim, cache)


def assert_attention_fits(capability, heads, dim, cache):
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    with compiling_for(NoDevice(capability)) as kernels:
        backend = attend_once(heads, dim, 64, None, dtype, cache)
        _, decode, prefill = kernels
        check(prefill)
        check(decode)
        if capability >= 80:
            assert 16 in copies(decode.asm["ptx"])
    (launch,) = backend.shapes.values()
    programs = usage(decode).programs(gpu_kind(divmod(capability, 10)))
    assert launch.programs <= programs * MULTIPROCESSORS, "all programs of a decode run at once"
    if dim == 128 and capability in (86, 89, 120):
        assert launch.programs == 2 * MULTIPROCESSORS


PRODUCTS = [1, 32, 200]  # rows


def multiply_once(rows) -> None:
    """The products of a layer of Qwen3-0.6B that have kernels of ours."""
    down, gate_up = torch.zeros(1024, 3072), torch.zeros(6144, 1024)
    x = torch.zeros(rows, 3072, dtype=torch.bfloat16)
    linear_triton.linear(x, down.bfloat16(), None)
    linear_triton.swiglu(x[:, :1024], gate_up.bfloat16(), None)


@pytest.mark.parametrize("rows", PRODUCTS)
def test_products_of_few_rows(compiled, rows):
    multiply_once(rows)
    assert len(compiled) == 2
    for kernel in compiled:
        ptx = check(kernel)
        assert copies(ptx) == {16}
        assert ("wgmma" if rows >= 64 else "mma.sync") in ptx
        assert max(int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)) >= 2


def test_one_compilation_serves_many_numbers_of_rows(compiled):
    """A CUDA graph is recorded for each of some thirty numbers of rows."""
    for rows in (65, 128, 129, 200, 256):
        multiply_once(rows)
    assert len({id(kernel) for kernel in compiled}) == 2


@pytest.mark.parametrize("capability", [80, 86, 100, 120])
def test_products_of_few_rows_fit_every_gpu(capability):
    with compiling_for(NoDevice(capability)) as kernels:
        multiply_once(200)
        for kernel in kernels:
            check(kernel)


MEMORY_ACCESS = re.compile(r"\b(ld|st|atom|red|cp\.async)\S*\.global")


def test_kernels_that_start_early_wait_before_their_first_access_to_memory():
    """Programmatic dependent launch: the kernel before may still run."""
    x = torch.zeros(2, 2048, dtype=torch.bfloat16)
    slots = torch.zeros(2, dtype=torch.int32)
    with kernel_choice(KernelChoice(without=frozenset())), compiling_for(NoDevice(90)) as kernels:
        triton_ops.rms_norm(x, x[0], 1e-6)
        triton_ops.add_rms_norm(x, x.clone(), x[0], 1e-6)
        triton_ops.silu_and_mul(x)
        cache = torch.zeros(2, 4, 8, 64, 64, dtype=torch.bfloat16)
        triton_ops.write_qkv(x, slots, slots, rope_of(64, 1e-6), *cache)
        multiply_once(32)
        attend_once((16, 8), 128, 64, None, torch.bfloat16)
    early = {kernel.metadata.name for kernel in kernels if kernel.metadata.launch_pdl}
    assert early == {
        "_rms_norm_kernel",
        "_activation_and_mul_kernel",
        "_write_kernel",
        "_linear_kernel",
        "_swiglu_kernel",
        "_decode_kernel",
    }
    for kernel in kernels:
        ptx = kernel.asm["ptx"]
        if kernel.metadata.launch_pdl:
            start = ptx.index("griddepcontrol.wait")
            first = MEMORY_ACCESS.search(ptx)
            assert first is not None
            assert start < first.start(), kernel.metadata.name
            assert "griddepcontrol.launch_dependents" in ptx
        else:
            assert "griddepcontrol" not in ptx


@pytest.mark.parametrize("capability", [75, 89])
def test_no_kernel_starts_early_on_older_gpus(capability):
    x = torch.zeros(2, 1024, dtype=torch.float16)
    with (
        kernel_choice(KernelChoice(without=frozenset())),
        compiling_for(NoDevice(capability)) as kernels,
    ):
        triton_ops.rms_norm(x, x[0], 1e-6)
    assert "griddepcontrol" not in kernels[0].asm["ptx"]


def rope_of(dim: int, eps: float | None, rotary_dim: int | None = None, offset=0.0) -> Rope:
    norm = None if eps is None else torch.zeros(dim, dtype=torch.bfloat16)
    cos_sin = torch.zeros(64, rotary_dim or dim)
    return Rope(16, 8, dim, cos_sin, norm, norm, eps or 0.0, offset)


@pytest.mark.parametrize(
    ("dim", "norm", "rotary_dim", "offset"),
    [
        (80, None, None, 0.0),
        (128, None, None, 0.0),
        (80, 1e-6, None, 0.0),
        (128, 1e-6, None, 0.0),
        (256, 1e-6, None, 1.0),  # Gemma 3
        (128, None, 96, 0.0),  # Phi-4-mini
        (128, 1e-6, 64, 0.0),  # GLM-4.5
    ],
)
def test_write(compiled, dim, norm, rotary_dim, offset):
    rope = rope_of(dim, norm, rotary_dim, offset)
    slots = torch.zeros(2, dtype=torch.int32)
    cache = torch.zeros(2, 4, 8, 64, dim, dtype=torch.bfloat16)
    triton_ops.write_qkv(torch.zeros(2, 32 * dim, dtype=torch.bfloat16), slots, slots, rope, *cache)
    assert_wide(check(compiled[0]))


@pytest.mark.parametrize("size", [1024, 5120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elementwise(compiled, size, dtype):
    x = torch.zeros(2, 2 * size, dtype=dtype)
    triton_ops.rms_norm(x, x[0], 1e-6)
    triton_ops.add_rms_norm(x, x.clone(), x[0], 1e-6)
    triton_ops.silu_and_mul(x)
    triton_ops.gelu_and_mul(x)
    triton_ops.add_rms_norm(x, x.clone(), x[0], 1e-6, 1.0, True)
    for kernel in compiled:
        assert_wide(check(kernel))


MOE = [  # experts, top_k, hidden, intermediate
    (128, 8, 2048, 768),  # Qwen3-30B-A3B
    (32, 4, 2880, 2880),  # gpt-oss-20b
]


def run_experts(tokens, experts, top_k, hidden, intermediate, dtype) -> None:
    """Launches the kernels of one mixture, as `layers/moe.py` does, with random contents."""
    x = torch.zeros(tokens, hidden, dtype=dtype)
    weights, ids = moe_triton.route(torch.zeros(tokens, experts, dtype=dtype), top_k, True)
    _, rows, offsets = moe_triton.group_by_expert(ids, 0, experts)
    x = x.repeat(top_k, 1)
    weight = torch.zeros(1, dtype=dtype).expand(experts * 2 * intermediate, hidden)
    bias = torch.zeros(len(weight), dtype=dtype)
    moe_triton.grouped_linear(x, weight, offsets, bias)
    moe_triton.clamped_swiglu(x, 1.702, 7.0)
    moe_triton.combine(x, rows, weights)


@pytest.mark.parametrize(
    ("sizes", "tokens", "dtype"),
    [
        (MOE[0], 1, torch.bfloat16),
        (MOE[1], 16, torch.bfloat16),
        (MOE[0], 512, torch.float16),
        (MOE[1], 2048, torch.bfloat16),
    ],
)
def test_experts(compiled, sizes, tokens, dtype):
    run_experts(tokens, *sizes, dtype)
    route, group, grouped, activation, combine = compiled
    check(route)
    check(group)
    assert_wide(check(activation))
    assert_wide(check(combine))
    ptx = check(grouped)
    assert copies(ptx) == {16}
    rows = tokens * sizes[1] // sizes[0]  # of a group
    assert ("wgmma" if rows >= 64 else "mma.sync") in ptx


def test_experts_in_float32(compiled):
    run_experts(16, *MOE[0], torch.float32)
    for kernel in compiled:
        check(kernel)


def test_a_mixture_of_experts_never_waits_for_the_device(monkeypatch):
    """Fake tensors have no contents: an operation that needs some on the host raises."""
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **options: None)
    with FakeTensorMode():
        run_experts(16, *MOE[0], torch.bfloat16)
        with pytest.raises(DataDependentOutputException):
            torch.zeros(1).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sampling(compiled, dtype):
    logits, row, k = (
        torch.zeros(2, 151936, dtype=dtype),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int32),
    )
    triton_ops.draw(logits, row, row)
    triton_ops.draw(logits, row, row, triton_ops.filter_threshold(logits, row, k, row, row))
    assert len(compiled) == 6
    for kernel in compiled:
        assert_wide(check(kernel))


def launch_others(dtype) -> None:
    """Launches all kernels but attention, products and experts."""
    x, row, k = (
        torch.zeros(2, 2048, dtype=dtype),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int32),
    )
    triton_ops.add_rms_norm(x, x.clone(), x[0], 1e-6)
    triton_ops.silu_and_mul(x)
    triton_ops.draw(x, row, row, triton_ops.filter_threshold(x, row, k, row, row))
    rope = rope_of(64, 1e-6)
    triton_ops.write_qkv(x, k, k, rope, *torch.zeros(2, 4, 8, 64, 64, dtype=dtype))


def test_kernels_compile_for_a_t4_too():
    with compiling_for(NoDevice(75)) as kernels:
        launch_others(torch.float16)
        for kernel in kernels:
            check(kernel)


def test_every_kernel_compiles_for_an_mi300_too(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with compiling_for(NoInstinct(94)) as kernels:
        attend_once((8, 4), 256, 64, 4096, torch.bfloat16, softcap=50.0)
        attend_once((16, 8), 128, 16, None, torch.bfloat16, sinks=True)
        launch_others(torch.bfloat16)
        for tokens in (1, 2048):
            run_experts(tokens, *MOE[0], torch.bfloat16)
    for kernel in kernels:
        assert re.findall(r"\.vgpr_spill_count: +(\d+)", kernel.asm["amdgcn"]) == ["0"], (
            kernel.metadata.name
        )
        assert kernel.metadata.shared <= 64 * 1024
    names = {kernel.metadata.name for kernel in kernels}
    assert len(names) == 15, names
