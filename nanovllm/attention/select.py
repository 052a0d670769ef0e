"""Which attention backend runs where, and why."""

from __future__ import annotations

import logging

from nanovllm.attention import AttentionBackend, AttentionSpec
from nanovllm.attention.torch_backend import TorchAttention

logger = logging.getLogger("nanovllm")


def select_backend(spec: AttentionSpec, name: str | None) -> AttentionBackend:
    """The backend called `name`, or the fastest that the device can run. Raises ValueError for an unknown name."""
    if name not in (None, "torch"):
        raise ValueError(f"attention_backend={name!r} is not known; accepted are None and 'torch'")
    return TorchAttention(spec)
