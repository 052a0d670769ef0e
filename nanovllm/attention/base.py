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
from nanovllm.cache.spec import CacheSpec, PagedKV, paged_layers
from nanovllm.core.batch import AttentionMetadata
from nanovllm.kernels.rope import Rope


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of each layer that has pages, and the form of the pages.

    Backends number layers by `layers`.
    """

    layers: tuple[PagedKV, ...]
    block_size: int  # tokens of one page
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls,
        specs: Sequence[CacheSpec],
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> AttentionSpec:
        """The spec for layers that remember `specs`."""
        return cls(tuple(paged_layers(specs)), block_size, dtype, device)

    @property
    def largest_head(self) -> int:
        """The largest size of a head of any layer, of K or of V."""
        return max(max(layer.head_dim, layer.value_size) for layer in self.layers)

    def uncommon(self) -> str | None:
        """What a layer asks for that plain attention lacks, or None."""
        first = self.layers[0]._replace(window=None)
        for layer in self.layers:
            if layer._replace(window=None) != first:
                return "layers of different shapes"
            if layer.value_size != layer.head_dim:
                return "value heads of another size than key heads"
            if layer.softcap is not None:
                return "softcap of the scores"
            if layer.has_sinks:
                return "sinks in the softmax"
        return None


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
        numbers = sum(
            layer.num_kv_heads * (layer.head_dim + layer.value_size) for layer in self.spec.layers
        )  # of one token
        return self.spec.block_size * numbers * self.spec.dtype.itemsize

    @abstractmethod
    def allocate(self, num_blocks: int) -> None:
        """Makes `num_blocks` zeroed pages. Earlier pages are dropped."""

    def begin(self, meta: AttentionMetadata[Tensor]) -> None:
        """Takes the metadata of a step. Called once, before the first layer."""
        self.meta = meta

    def write(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """QK-norm and RoPE, then K and V into their pages: [T, (Hq + 2 Hkv) D] -> q [T, Hq, D].

        For layers whose values have the size of keys. Other layers call `store`.
        """
        q, k, v = kernels.qk_norm_rope(qkv, self.meta.positions, rope)
        self.store(layer, k, v)
        return q

    @abstractmethod
    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes k [T, Hkv, D] and v [T, Hkv, Dv] to `slot_mapping`."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Causal attention of q [T, Hq, D] over the pages -> [T, Hq * Dv].

        sinks [Hq]: one more score of each head, for layers with `has_sinks`. It takes part
        in the softmax and has no value (gpt-oss).
        """


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


PageShapes = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]  # of K and of V for each layer


def zeroed_pages(
    shapes: PageShapes, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """(all numbers of each layer [n], its K and V as views of them).

    One tensor holds all layers, because an allocator rounds the size of each tensor up.
    """
    sizes = [prod(k) + prod(v) for k, v in shapes]
    numbers = torch.zeros(sum(sizes), dtype=dtype, device=device)
    layers = list(numbers.split(sizes))
    pages = []
    for layer, (k_shape, v_shape) in zip(layers, shapes, strict=True):
        k, v = layer.split([prod(k_shape), prod(v_shape)])
        pages.append((k.view(k_shape), v.view(v_shape)))
    return layers, pages
