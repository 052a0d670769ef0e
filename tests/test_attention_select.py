"""Which attention backend is chosen, and what is said about it."""

from __future__ import annotations

import logging
from importlib import import_module

import pytest
import torch

from nanovllm.attention import select
from nanovllm.attention.base import AttentionSpec
from nanovllm.attention.select import BACKENDS, VLLM_NAMES, select_backend
from nanovllm.attention.torch_backend import TorchAttention
from nanovllm.cache.spec import PagedKV


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


def test_a_gpu_without_triton_and_flash_attn_runs_the_torch_backend(monkeypatch, caplog):
    def without(name: str) -> object:
        if "triton" in name or "flash" in name:
            raise ImportError(f"No module named {name!r}")
        return import_module(name)

    monkeypatch.setattr(select, "import_module", without)
    with caplog.at_level(logging.INFO, "nanovllm"):
        assert isinstance(select_backend(spec("cuda"), None), TorchAttention)
    assert "not flash: No module named" in caplog.text
    assert "not triton: No module named" in caplog.text


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
