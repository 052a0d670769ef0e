"""Which attention backend runs where, and why."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from nanovllm.attention.base import AttentionBackend, AttentionSpec

logger = logging.getLogger("nanovllm")

# Each in a module of its own, imported when it is tried: Triton alone takes half a second.
BACKENDS = {
    "flash": "flash_backend.FlashAttention",
    "triton": "triton_backend.TritonAttention",
    "cpu": "cpu_backend.CpuAttention",
    "torch": "torch_backend.TorchAttention",
}
FASTEST_FIRST = {"cuda": ("flash", "triton", "torch"), "cpu": ("cpu", "torch")}


def select_backend(spec: AttentionSpec, name: str | None, kv_cache_dtype: str = "auto") -> AttentionBackend:
    """The backend called `name`, or the fastest that can run `spec`. Raises ValueError for a name that cannot."""
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"attention_backend={name!r} is not known; accepted are None, {', '.join(map(repr, BACKENDS))}"
        )
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
    """The backend, or why there is none."""
    module, _, class_name = BACKENDS[name].partition(".")
    try:
        backend: Any = getattr(import_module(f"nanovllm.attention.{module}"), class_name)
    except ImportError as err:
        return f"{err}"
    if kv_cache_dtype != "auto" and name != "triton":
        return f"kv_cache_dtype={kv_cache_dtype!r} is for the triton backend"
    if reason := backend.refuses(spec):
        return reason
    return backend(spec) if kv_cache_dtype == "auto" else backend(spec, kv_cache_dtype)
