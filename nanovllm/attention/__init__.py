"""Paged attention: `base.py` is the interface, `select.py` the choice, and each backend is a file."""

from nanovllm.attention.base import AttentionBackend, AttentionMetadata, AttentionSpec, zeroed

__all__ = ["AttentionBackend", "AttentionMetadata", "AttentionSpec", "zeroed"]
