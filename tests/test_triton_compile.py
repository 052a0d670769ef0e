"""Every kernel, as its caller launches it, compiled ahead of time for A100, H100 and MI300: no spills, 16-byte accesses.

No GPU takes part. A driver without a device stands in for CUDA's, and launches stop after the compilation.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="no triton for this platform")

from attention_reference import make_case  # noqa: E402
from torch._subclasses.fake_tensor import (  # noqa: E402
    DataDependentOutputException,
    FakeTensorMode,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from nanovllm.attention.triton_backend import TritonAttention, prefill_shape  # noqa: E402
from nanovllm.kernels import moe_triton, triton_ops  # noqa: E402
from nanovllm.kernels.rope import Rope  # noqa: E402

RESOURCES = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
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


class NoDevice:
    """What `JITFunction.run` asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class NoInstinct(NoDevice):
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", "gfx942", 64)


def compile_launches(monkeypatch, device: NoDevice) -> list:
    """A list to which every launch adds its compiled kernel."""
    kernels = []
    run = triton.JITFunction.run
    monkeypatch.setattr(driver, "_active", device)
    monkeypatch.setattr(
        triton.JITFunction,
        "run",
        lambda *args, warmup, **kwargs: kernels.append(run(*args, warmup=True, **kwargs)),
    )
    return kernels


@pytest.fixture(params=[80, 90])
def compiled(request, monkeypatch):
    return compile_launches(monkeypatch, NoDevice(request.param))


def check(kernel, tmp_path) -> str:
    """Asserts that no register is spilled; returns the PTX."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    report = subprocess.run(
        [RESOURCES, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    )
    usage = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", report.stdout))
    print(kernel.metadata.name, usage, f"shared {kernel.metadata.shared}")
    assert usage["STACK"] == usage["LOCAL"] == "0", f"{kernel.metadata.name} spills: {usage}"
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
    ((3, 1), 80, 16, None, torch.float16, "auto"),
    ((16, 8), 128, 64, None, torch.bfloat16, "fp8"),
    ((32, 8), 128, 16, None, torch.bfloat16, "fp8"),
    ((9, 3), 64, 64, None, torch.bfloat16, "fp8"),
    ((9, 3), 64, 16, None, torch.float16, "fp8"),
    ((8, 4), 256, 64, 512, torch.bfloat16, "fp8"),
]


def attend_once(
    heads, dim, page, window, dtype, cache="auto", *, capability=None, **words
) -> TritonAttention:
    """Launches all kernels of attention, with the options for `capability` where it is given."""
    case = make_case(
        [3, 1],
        [70, 80],
        heads=heads,
        head_dim=dim,
        block_size=page,
        windows=(window,),
        dtype=dtype,
        **words,
    )
    backend = TritonAttention(case.spec, cache)
    (launch,) = backend.shapes.values()
    if capability is not None:
        largest = max(dim, case.spec.layers[0].value_size)
        options = (largest, dtype, backend.cache_dtype, divmod(capability, 10))
        launch.prefill = prefill_shape(*options)
        launch.programs = 264
    backend.allocate(case.num_blocks)
    backend.begin(case.metadata([67, 79], [70, 80]))
    backend.attend(0, torch.cat(case.q), case.sinks)
    return backend


WORDS = [  # heads, head_dim, block_size, window, dtype, kv_cache_dtype, what `make_case` gets
    ((64, 8), 64, 16, 128, torch.bfloat16, "auto", {"sinks": True}),  # gpt-oss
    ((8, 4), 256, 64, 4096, torch.bfloat16, "auto", {"softcap": 50.0}),  # Gemma 2, 2B
    ((8, 4), 256, 16, None, torch.bfloat16, "fp8", {"softcap": 50.0}),
    ((16, 16), 192, 64, None, torch.bfloat16, "auto", {"value_dim": 128}),  # DeepSeek-V2
    ((4, 2), 64, 16, None, torch.float32, "auto", {"softcap": 50.0, "sinks": True}),
]


@pytest.mark.parametrize(("heads", "dim", "page", "window", "dtype", "cache", "words"), WORDS)
def test_attention_with_words(compiled, tmp_path, heads, dim, page, window, dtype, cache, words):
    if cache == "fp8" and driver.active.capability < 89:
        pytest.skip("float8 needs compute capability 8.9")
    capability = driver.active.capability
    attend_once(heads, dim, page, window, dtype, cache, capability=capability, **words)
    _, decode, prefill = compiled
    for kernel in (prefill, decode):
        check(kernel, tmp_path)
        assert kernel.metadata.shared <= 160 * 1024


@pytest.mark.parametrize(("heads", "dim", "page", "window", "dtype", "cache"), SHAPES)
def test_attention(compiled, tmp_path, heads, dim, page, window, dtype, cache):
    if cache == "fp8" and driver.active.capability < 89:
        pytest.skip("float8 needs compute capability 8.9")
    capability = driver.active.capability
    backend = attend_once(heads, dim, page, window, dtype, cache, capability=capability)
    plan, decode, prefill = compiled
    check(plan, tmp_path)
    for kernel in (prefill, decode):
        ptx = check(kernel, tmp_path)
        assert kernel.metadata.shared <= 160 * 1024
        if (
            kernel.metadata.num_stages > 2
        ):  # K and V of the next tile are on their way while one is worked on
            assert max(int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)) >= 2
        assert 16 in copies(ptx) or ((cache == "fp8" or dim == 8) and copies(ptx) == {8})
        if dtype != torch.float32:
            warp_groups = (
                kernel is prefill
                and driver.active.capability == 90
                and backend.launches[0].prefill["BLOCK_M"] >= 64
            )
            assert ("wgmma" if warp_groups else "mma.sync") in ptx


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
def test_write(compiled, tmp_path, dim, norm, rotary_dim, offset):
    rope = rope_of(dim, norm, rotary_dim, offset)
    slots = torch.zeros(2, dtype=torch.int32)
    cache = torch.zeros(2, 4, 8, 64, dim, dtype=torch.bfloat16)
    triton_ops.write_qkv(torch.zeros(2, 32 * dim, dtype=torch.bfloat16), slots, slots, rope, *cache)
    assert_wide(check(compiled[0], tmp_path))


@pytest.mark.parametrize("size", [1024, 5120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elementwise(compiled, tmp_path, size, dtype):
    x = torch.zeros(2, 2 * size, dtype=dtype)
    triton_ops.rms_norm(x, x[0], 1e-6)
    triton_ops.add_rms_norm(x, x.clone(), x[0], 1e-6)
    triton_ops.silu_and_mul(x)
    triton_ops.gelu_and_mul(x)
    triton_ops.add_rms_norm(x, x.clone(), x[0], 1e-6, 1.0, True)
    for kernel in compiled:
        assert_wide(check(kernel, tmp_path))


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
def test_experts(compiled, tmp_path, sizes, tokens, dtype):
    run_experts(tokens, *sizes, dtype)
    route, group, grouped, activation, combine = compiled
    check(route, tmp_path)
    check(group, tmp_path)
    assert_wide(check(activation, tmp_path))
    assert_wide(check(combine, tmp_path))
    ptx = check(grouped, tmp_path)
    assert grouped.metadata.shared <= 160 * 1024
    assert copies(ptx) == {16}
    rows = tokens * sizes[1] // sizes[0]  # of a group
    warp_groups = driver.active.capability == 90 and rows >= 64
    assert ("wgmma" if warp_groups else "mma.sync") in ptx


def test_experts_in_float32(compiled, tmp_path):
    run_experts(16, *MOE[0], torch.float32)
    for kernel in compiled:
        check(kernel, tmp_path)


def test_a_mixture_of_experts_never_waits_for_the_device(monkeypatch):
    """Fake tensors have no contents: an operation that needs some on the host raises."""
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **options: None)
    with FakeTensorMode():
        run_experts(16, *MOE[0], torch.bfloat16)
        with pytest.raises(DataDependentOutputException):
            torch.zeros(1).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sampling(compiled, tmp_path, dtype):
    logits, row, k = (
        torch.zeros(2, 151936, dtype=dtype),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int32),
    )
    triton_ops.draw(logits, row, row)
    triton_ops.draw(logits, row, row, triton_ops.filter_threshold(logits, row, k, row, row))
    assert len(compiled) == 6
    for kernel in compiled:
        assert_wide(check(kernel, tmp_path))


def test_every_kernel_compiles_for_an_mi300_too(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    kernels = compile_launches(monkeypatch, NoInstinct(942))
    for heads, dim, page, window, dtype, cache in SHAPES[::3]:
        if cache == "auto":
            attend_once(heads, dim, page, window, dtype)
    for heads, dim, page, window, dtype, cache, words in WORDS[::2]:
        if cache == "auto":
            attend_once(heads, dim, page, window, dtype, **words)
    x, row, k = (
        torch.zeros(2, 2048, dtype=torch.bfloat16),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int32),
    )
    triton_ops.add_rms_norm(x, x.clone(), x[0], 1e-6)
    triton_ops.silu_and_mul(x)
    triton_ops.draw(x, row, row, triton_ops.filter_threshold(x, row, k, row, row))
    for tokens in (1, 2048):
        run_experts(tokens, *MOE[0], torch.bfloat16)
    rope = rope_of(64, 1e-6)
    triton_ops.write_qkv(x, k, k, rope, *torch.zeros(2, 4, 8, 64, 64, dtype=torch.bfloat16))
    for kernel in kernels:
        assert re.findall(r"\.vgpr_spill_count: +(\d+)", kernel.asm["amdgcn"]) == ["0"], (
            kernel.metadata.name
        )
        assert kernel.metadata.shared <= 64 * 1024
    names = {kernel.metadata.name for kernel in kernels}
    assert len(names) == 15, names
