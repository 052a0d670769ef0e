"""Paged attention in plain PyTorch, one sequence after the other.

It runs on every torch device and is fast on none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.attention.base import AttentionBackend, zeroed
from nanovllm.core.batch import AttentionMetadata, ceil_div


class TorchAttention(AttentionBackend):
    """Pages are [num_blocks + 1, block_size, Hkv, D]. The last page takes the tokens of slot -1."""

    can_capture = False  # reads lengths and page ids on the host

    def allocate(self, num_blocks: int) -> None:
        spec = self.spec
        pages = (num_blocks + 1, spec.block_size, spec.num_kv_heads, spec.head_dim)
        self.cache = zeroed((spec.num_layers, 2, *pages), spec.dtype, spec.device)

    def begin(self, meta: AttentionMetadata[Tensor]) -> None:
        super().begin(meta)
        self.query_start: list[int] = meta.query_start.tolist()
        self.context_lens: list[int] = meta.context_lens.tolist()
        self.slots = meta.slot_mapping.long()

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys, values = self.cache[layer].flatten(1, 2)  # [slots, Hkv, D] each
        keys[self.slots] = k
        values[self.slots] = v

    def attend(self, layer: int, q: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for i, context_len in enumerate(self.context_lens):
            queries = slice(self.query_start[i], self.query_start[i + 1])
            if queries.start < queries.stop:
                out[queries] = self.attend_one(layer, i, q[queries], context_len)
        return out.flatten(1)

    def attend_one(self, layer: int, sequence: int, q: Tensor, context_len: int) -> Tensor:
        """Attention of the last queries of one sequence: q [n, Hq, D] -> [n, Hq, D]."""
        spec = self.spec
        num_pages = ceil_div(context_len, spec.block_size)
        pages = self.meta.block_tables[sequence, :num_pages].long()
        keys, values = self.cache[layer]
        k = keys[pages].flatten(0, 1)[:context_len].transpose(0, 1)  # [Hkv, context_len, D]
        v = values[pages].flatten(0, 1)[:context_len].transpose(0, 1)
        key_position = torch.arange(context_len, device=q.device)
        query_position = key_position[context_len - len(q) :, None]  # [n, 1]
        mask = key_position <= query_position  # [n, context_len]
        window = spec.sliding_windows[layer]
        if window is not None:
            mask &= key_position > query_position - window
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k[None],
            v[None],
            attn_mask=mask,
            scale=spec.scale,
            enable_gqa=True,
        )  # [1, Hq, n, D]
        return out[0].transpose(0, 1)
