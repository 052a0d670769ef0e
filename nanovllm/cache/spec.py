"""What a layer remembers of a sequence between steps.

A model declares it (`cache_specs`). Nothing is allocated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch


class PagedKV(NamedTuple):
    """K and V of every token, in pages, and how the layer's queries read them.

    Heads are counted on this rank. A query q has the score s = scale * (q . k) for a key k.
    With a softcap c the score is c * tanh(s / c) (Gemma 2).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int  # of a query and of a key
    window: int | None = None  # the query at p sees keys p - window + 1 .. p; None: all
    value_dim: int | None = None  # of a value, where it is not head_dim
    scale: float | None = None  # None: head_dim ** -0.5
    softcap: float | None = None
    has_sinks: bool = False  # the softmax has one learned score more (gpt-oss)

    @property
    def value_size(self) -> int:
        """Numbers of one value head."""
        return self.value_dim or self.head_dim

    @property
    def score_scale(self) -> float:
        """The factor of q . k."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


class RowState(NamedTuple):
    """Tensors of fixed shapes for each sequence, at its row of the sequence table."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes for one sequence."""
        return sum(prod(shape) for shape in self.shapes) * self.dtype.itemsize


CacheSpec = PagedKV | RowState


def paged_layers(specs: Sequence[CacheSpec]) -> list[PagedKV]:
    """The specs that take pages, in the order of the layers.

    Attention backends number their layers by this list.
    """
    return [spec for spec in specs if isinstance(spec, PagedKV)]


def row_bytes(specs: Sequence[CacheSpec]) -> int:
    """Bytes of fixed state that one sequence takes in all layers."""
    return sum(spec.row_bytes for spec in specs if isinstance(spec, RowState))
