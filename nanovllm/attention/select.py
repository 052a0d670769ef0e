"""Which attention backend runs where, and why."""

from __future__ import annotations

import logging

from nanovllm.attention import AttentionBackend, AttentionSpec
from nanovllm.attention.cpu_backend import CpuAttention
from nanovllm.attention.torch_backend import TorchAttention

logger = logging.getLogger("nanovllm")

# Fastest first; each says what it cannot run.
BACKENDS: dict[str, type[AttentionBackend]] = {"cpu": CpuAttention, "torch": TorchAttention}


def select_backend(spec: AttentionSpec, name: str | None) -> AttentionBackend:
    """The backend called `name`, or the fastest that can run `spec`. Raises ValueError for a name that cannot."""
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"attention_backend={name!r} is not known; accepted are None, {', '.join(map(repr, BACKENDS))}"
        )
    reasons: list[str] = []
    for candidate in [name] if name else BACKENDS:
        reason = BACKENDS[candidate].refuses(spec)
        if reason is None:
            why = f" ({'; '.join(reasons)})" if reasons else ""
            logger.info("attention: the %s backend runs%s", candidate, why)
            return BACKENDS[candidate](spec)
        reasons.append(f"not {candidate}: {reason}")
    raise ValueError(f"attention_backend={name!r} cannot run here: {reasons[0]}")
