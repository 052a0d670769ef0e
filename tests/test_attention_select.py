"""Which attention backend is chosen, and what is said about it."""

from __future__ import annotations

import logging
from importlib import import_module
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import kernels
from nanovllm.attention import select
from nanovllm.attention.base import AttentionSpec
from nanovllm.attention.select import BACKENDS, VLLM_NAMES, select_backend
from nanovllm.attention.torch_backend import TorchAttention
from nanovllm.cache.spec import PagedKV
from nanovllm.compilation import Compilation
from nanovllm.kernels import gpu_table, moe
from nanovllm.kernels.gpu_table import DeviceProperties
from nanovllm.runner.setup import Setup


def spec(device: str = "cpu", dtype: torch.dtype = torch.float32) -> AttentionSpec:
    return AttentionSpec((PagedKV(4, 2, 32),), 16, dtype, torch.device(device))


def test_one_line_says_which_backend_runs_and_why_not_a_faster_one(caplog):
    with caplog.at_level(logging.INFO, "nanovllm"):
        backend = select_backend(spec(dtype=torch.float64), None)
    assert isinstance(backend, TorchAttention)
    (record,) = caplog.records
    assert record.getMessage() == (
        "attention: the torch backend runs (not cpu: there is no C++ kernel for torch.float64 here)"
    )


@pytest.mark.parametrize("error", [ImportError, RuntimeError, AttributeError, OSError])
def test_a_gpu_without_triton_and_flash_attn_runs_the_torch_backend(monkeypatch, caplog, error):
    def without(name: str) -> object:
        if "triton" in name or "flash" in name:
            raise error(f"No module named {name!r}")
        return import_module(name)

    monkeypatch.setattr(select, "import_module", without)
    with caplog.at_level(logging.INFO, "nanovllm"):
        assert isinstance(select_backend(spec("cuda"), None), TorchAttention)
    assert "not flash: No module named" in caplog.text
    assert "not triton: No module named" in caplog.text


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 0), torch.float16, "7.5 or higher, not 7.0"),
        ((7, 5), torch.bfloat16, "dtype='float16' runs"),
        ((7, 5), torch.float16, None),
        ((12, 1), torch.bfloat16, None),
    ],
)
def test_the_oldest_gpus_of_the_triton_backend_run_float16(monkeypatch, capability, dtype, reason):
    pytest.importorskip("triton")
    from nanovllm.attention.triton_backend import TritonAttention

    found = DeviceProperties(capability, 40)
    monkeypatch.setattr(gpu_table, "device_properties", lambda device: found)
    monkeypatch.setattr(kernels, "gpu", lambda: kernels)
    refused = TritonAttention.refuses(spec("cuda", dtype))
    assert refused is None if reason is None else reason in (refused or "")


def test_a_gpu_has_the_row_of_its_capability_or_of_the_next_lower_one():
    rows = {(9, 0): (9, 0), (8, 9): (8, 9), (10, 3): (10, 0), (12, 1): (12, 0), (7, 0): (7, 5)}
    for capability, row in rows.items():
        assert gpu_table.gpu_kind(capability) is gpu_table.TABLE[row]


@pytest.fixture
def first_use_of_triton():
    for cached in (kernels.gpu, moe.gpu):
        cached.cache_clear()
    yield
    for cached in (kernels.gpu, moe.gpu):
        cached.cache_clear()


@pytest.mark.usefixtures("first_use_of_triton")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        CalledProcessError(1, ["gcc", "cuda_utils.c"]),  # Python.h is missing
    ],
)
def test_a_gpu_on_which_triton_cannot_build_its_launcher_runs_plain_torch(
    monkeypatch, caplog, error
):
    pytest.importorskip("triton")

    def get_current_target() -> None:
        raise error

    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=get_current_target))
    monkeypatch.setattr("triton.runtime.driver", driver)
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    with caplog.at_level(logging.INFO, "nanovllm"):
        assert isinstance(select_backend(spec("cuda"), None), TorchAttention)
        assert kernels.triton_for(on_gpu, "rms_norm") is None
        assert moe.triton_for(on_gpu, "route") is None
        setup: Any = SimpleNamespace(device=torch.device("cuda"), compilation=Compilation())
        assert not Setup.compiles_models.fget(setup), "for GPUs torch.compile needs Triton"
    (warning,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert str(error) in warning.getMessage()
    assert "install gcc and python3-dev" in warning.getMessage()
    with pytest.raises(ValueError, match="not triton: Triton cannot run kernels here"):
        select_backend(spec("cuda"), "triton")


@pytest.mark.parametrize(
    ("name", "kv_cache_dtype", "message"),
    [
        (
            "nope",
            "auto",
            "attention_backend='nope' is not known; accepted are None, 'flash', 'triton', 'varlen', 'cpu', "
            "'torch', 'FLASH_ATTN', 'TRITON_ATTN', 'CPU_ATTN', 'TORCH_SDPA'",
        ),
        (
            "flash",
            "auto",
            "attention_backend='flash' cannot run here: not flash: .*not torch.float32 on cpu",
        ),
        ("torch", "fp8", "not torch: kv_cache_dtype='fp8' is for the triton backend"),
        (
            None,
            "fp8",
            "attention_backend=None cannot run here: not cpu: kv_cache_dtype='fp8' is for the triton backend",
        ),
    ],
)
def test_a_backend_that_cannot_run_is_refused_by_a_sentence(name, kv_cache_dtype, message):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=message):
        select_backend(spec(), name, kv_cache_dtype)


@pytest.mark.parametrize("name", ["FLASHINFER", "FLEX_ATTENTION"])
def test_a_kernel_of_vllm_s_that_we_lack_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"attention_backend='{name}' is not known; accepted"):
        select_backend(spec(), name)


def test_vllm_s_names_of_backends_stand_for_ours():
    assert isinstance(select_backend(spec(), "TORCH_SDPA"), TorchAttention)
    with pytest.raises(ValueError, match="not flash: it runs float16 and bfloat16 on CUDA"):
        select_backend(spec(), "FLASH_ATTN")
    assert set(VLLM_NAMES.values()) <= set(BACKENDS)


def test_a_backend_whose_import_fails_in_any_way_is_passed_over(monkeypatch, caplog):
    """Triton may import and then find no compiler, or no driver."""

    def failing(name: str) -> object:
        if name.endswith("cpu_backend"):
            raise RuntimeError("Failed to find C compiler")
        return import_module(name)

    monkeypatch.setattr(select, "import_module", failing)
    with caplog.at_level(logging.INFO, "nanovllm"):
        assert isinstance(select_backend(spec(), None), TorchAttention)
    assert "not cpu: Failed to find C compiler" in caplog.text


def test_every_name_stands_for_a_backend():
    pytest.importorskip("triton")
    for path in BACKENDS.values():
        module, _, name = path.rpartition(".")
        assert hasattr(import_module(module), name)
