"""Paged attention: what a backend is told (`AttentionSpec`, `AttentionMetadata`) and what it must do (`AttentionBackend`).

This is where PagedAttention lives: K and V of a sequence lie in pages ("blocks") anywhere in the cache, and the block table
says which. A backend owns the pages and their layout; it knows neither sequences nor the scheduler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.cache.spec import CacheSpec, paged_layers
from nanovllm.kernels.rope import Rope


@dataclass(frozen=True)
class AttentionSpec:
    """The shape of a model's attention and of its pages; head counts are those of this rank, layers those with pages."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_windows: tuple[int | None, ...]  # one a layer: the query at p sees keys p - window + 1 .. p
    block_size: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls, specs: Sequence[CacheSpec], *, num_heads: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> AttentionSpec:
        """From what a model's layers remember. Raises ValueError where layers with pages differ in heads or head size."""
        layers = paged_layers(specs)
        shapes = {(layer.num_kv_heads, layer.head_dim) for layer in layers}
        if len(shapes) != 1:
            raise ValueError(
                f"model: its layers have pages of the shapes (KV heads, head size) {sorted(shapes)}; accepted is one shape"
            )
        ((num_kv_heads, head_dim),) = shapes
        return cls(
            num_layers=len(layers),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            sliding_windows=tuple(layer.window for layer in layers),
            block_size=block_size,
            dtype=dtype,
            device=device,
        )


@dataclass
class AttentionMetadata:
    """One step as the layers see it: T tokens of S sequences, int32 tensors on the device.

    Tokens `query_start[i]:query_start[i + 1]` belong to sequence i, in order of position, and end at position
    `context_lens[i] - 1`. Rows of `block_tables` are padded with arbitrary valid block ids.
    """

    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T] block * block_size + offset of the token's K/V; -1 writes nowhere
    query_start: Tensor  # [S + 1]
    context_lens: Tensor  # [S] tokens of K/V to attend to, those of this step included
    block_tables: Tensor  # [S, max_blocks]
    max_query_len: int
    num_prefills: int  # sequences of more than one token
    max_context_len: int


class AttentionBackend(ABC):
    """Pages of K/V for all layers of one model, and attention over them.

    Every layer writes the K/V of the whole batch before it attends: a sequence may therefore read pages that another
    sequence of the same step fills.
    """

    can_capture = True  # whether a step can be recorded: nothing in it reads a tensor on the host
    meta: AttentionMetadata

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    @staticmethod
    def refuses(spec: AttentionSpec) -> str | None:
        """Why this backend cannot run `spec` on this machine, or None where it can."""
        return None

    def page_bytes(self) -> int:
        """Bytes of one page: K and V of `block_size` tokens in all layers."""
        spec = self.spec
        return 2 * spec.num_layers * spec.block_size * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize

    @abstractmethod
    def allocate(self, num_blocks: int) -> None:
        """Makes `num_blocks` zeroed pages, in place of those there were."""

    def begin(self, meta: AttentionMetadata) -> None:
        """Takes the step's metadata; called once, before the first layer."""
        self.meta = meta

    def write(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """QK-norm and RoPE, then K and V into their pages: [T, (Hq + 2 Hkv) D] -> q [T, Hq, D]."""
        q, k, v = kernels.qk_norm_rope(qkv, self.meta.positions, rope)
        self.store(layer, k, v)
        return q

    @abstractmethod
    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes k and v, [T, Hkv, D] each, to `slot_mapping`."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Causal attention of q [T, Hq, D] over the pages -> [T, Hq * D]."""


def zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros for pages; on the CPU memory that is not there before it is used, where torch.zeros writes all of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size, line = prod(shape) * dtype.itemsize, 64
    memory = torch.from_numpy(np.zeros(size + line, np.uint8))
    start = -memory.data_ptr() % line  # a vector that straddles two cache lines takes two loads
    return memory[start : start + size].view(dtype).view(shape)
