"""Paged attention: the interface of a backend, and the data that the backend gets.

K and V of a sequence lie in pages ("blocks") anywhere in the cache, and the block table
says in which ones. A backend owns the pages and their layout. It knows neither sequences
nor the scheduler.
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
from nanovllm.core.batch import AttentionMetadata
from nanovllm.kernels.rope import Rope


@dataclass(frozen=True)
class AttentionSpec:
    """The shape of a model's attention and of its pages.

    Heads are counted on this rank. Only layers with pages count as layers.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    # One a layer: the query at p sees keys p - window + 1 .. p. None: it sees all.
    sliding_windows: tuple[int | None, ...]
    block_size: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls,
        specs: Sequence[CacheSpec],
        *,
        num_heads: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> AttentionSpec:
        """The spec for layers that remember `specs`.

        Raises ValueError where layers with pages differ in heads or head size.
        """
        layers = paged_layers(specs)
        shapes = {(layer.num_kv_heads, layer.head_dim) for layer in layers}
        if len(shapes) != 1:
            raise ValueError(
                "model: its layers have pages of the shapes (KV heads, head size) "
                f"{sorted(shapes)}; accepted is one shape"
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


class AttentionBackend(ABC):
    """Pages of K/V for all layers of one model, and attention over them.

    Every layer writes the K/V of the whole batch before it attends. So a sequence may
    read pages that another sequence of the same step fills.
    """

    can_capture = True  # a CUDA graph can record a step, because it reads no tensor on the host
    meta: AttentionMetadata[Tensor]

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    @staticmethod
    def refuses(spec: AttentionSpec) -> str | None:
        """Why this backend cannot run `spec` on this machine, or None where it can."""
        return None

    def page_bytes(self) -> int:
        """Bytes of one page: K and V of `block_size` tokens in all layers."""
        spec = self.spec
        head_bytes = spec.head_dim * spec.dtype.itemsize
        token_bytes = 2 * spec.num_kv_heads * head_bytes
        return spec.num_layers * spec.block_size * token_bytes

    @abstractmethod
    def allocate(self, num_blocks: int) -> None:
        """Makes `num_blocks` zeroed pages. Earlier pages are dropped."""

    def begin(self, meta: AttentionMetadata[Tensor]) -> None:
        """Takes the metadata of a step. Called once, before the first layer."""
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
    """Zeros for pages. CPU memory begins at a cache line.

    numpy makes the zeros of the CPU, because the system then gives memory only when it is
    used. torch.zeros writes all of it.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    line = 64  # bytes of a cache line, because a vector across two lines takes two loads
    size = prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + line, np.uint8))
    start = -memory.data_ptr() % line
    return memory[start : start + size].view(dtype).view(shape)
