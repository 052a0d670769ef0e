"""The choice of the attention backend, with its reasons in the log or the error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module

from nanovllm.attention.base import AttentionBackend, AttentionSpec

logger = logging.getLogger("nanovllm")

# A module is imported when its backend is tried, because the import of Triton is slow.
BACKENDS = {
    "flash": "nanovllm.attention.flash_backend.FlashAttention",
    "triton": "nanovllm.attention.triton_backend.TritonAttention",
    "varlen": "nanovllm.attention.flash_backend.VarlenAttention",
    "cpu": "nanovllm.attention.cpu_backend.CpuAttention",
    "torch": "nanovllm.attention.torch_backend.TorchAttention",
}
FASTEST_FIRST = {"cuda": ("flash", "triton", "varlen", "torch"), "cpu": ("cpu", "torch")}

# vLLM's names for the same kind of kernel.
VLLM_NAMES = {
    "FLASH_ATTN": "flash",
    "TRITON_ATTN": "triton",
    "CPU_ATTN": "cpu",
    "TORCH_SDPA": "torch",
}


def select_backend(
    spec: AttentionSpec, name: str | None, kv_cache_dtype: str = "auto"
) -> AttentionBackend:
    """The backend called `name`. Without a name: the fastest backend that can run `spec`.

    Raises ValueError where `name` is unknown or cannot run `spec`.
    """
    if name is not None and name not in BACKENDS:
        if name not in VLLM_NAMES:
            accepted = ", ".join(map(repr, [*BACKENDS, *VLLM_NAMES]))
            raise ValueError(
                f"attention_backend={name!r} is not known; accepted are None, {accepted}"
            )
        name = VLLM_NAMES[name]
    reasons: list[str] = []
    for candidate in (name,) if name else FASTEST_FIRST[spec.device.type]:
        found = make(candidate, spec, kv_cache_dtype)
        if not isinstance(found, str):
            why = f" ({'; '.join(reasons)})" if reasons else ""
            logger.info("attention: the %s backend runs%s", candidate, why)
            return found
        reasons.append(f"not {candidate}: {found}")
    raise ValueError(f"attention_backend={name!r} cannot run here: {'; '.join(reasons)}")


def make(name: str, spec: AttentionSpec, kv_cache_dtype: str) -> AttentionBackend | str:
    """The backend, or the reason why it cannot run."""
    module, _, class_name = BACKENDS[name].rpartition(".")
    try:
        backend: type[AttentionBackend] = getattr(import_module(module), class_name)
    except Exception as err:  # Triton and what it loads may fail in any way
        return f"{err}"
    if kv_cache_dtype != "auto" and name != "triton":
        return f"kv_cache_dtype={kv_cache_dtype!r} is for the triton backend"
    reason = backend.refuses(spec)
    if reason:
        return reason
    if kv_cache_dtype == "auto":
        return backend(spec)
    of_cache_dtype: Callable[[AttentionSpec, str], AttentionBackend] = backend
    return of_cache_dtype(spec, kv_cache_dtype)
