"""Paged attention: `base.py` is the interface, `select.py` chooses, each backend is a file."""

from nanovllm.attention.base import AttentionBackend, AttentionSpec, zeroed
from nanovllm.core.batch import AttentionMetadata

__all__ = ["AttentionBackend", "AttentionMetadata", "AttentionSpec", "zeroed"]
