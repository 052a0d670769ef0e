"""Paged attention in plain PyTorch: right on every torch device, fast on none. One sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.attention.base import AttentionBackend, AttentionMetadata, zeroed


class TorchAttention(AttentionBackend):
    """Pages are [num_blocks + 1, block_size, Hkv, D]; the last page takes what is written to slot -1."""

    can_capture = False  # it reads lengths and page ids on the host

    def allocate(self, num_blocks: int) -> None:
        spec = self.spec
        shape = (spec.num_layers, 2, num_blocks + 1, spec.block_size, spec.num_kv_heads, spec.head_dim)
        self.cache = zeroed(shape, spec.dtype, spec.device)

    def begin(self, meta: AttentionMetadata) -> None:
        super().begin(meta)
        self.bounds = list(zip(meta.query_start.tolist(), meta.query_start.tolist()[1:], meta.context_lens.tolist()))
        self.slots = meta.slot_mapping.long()

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys, values = self.cache[layer].flatten(1, 2)
        keys[self.slots] = k
        values[self.slots] = v

    def attend(self, layer: int, q: Tensor) -> Tensor:
        spec, meta = self.spec, self.meta
        keys, values = self.cache[layer]
        window = spec.sliding_windows[layer]
        out = torch.empty_like(q)
        for i, (start, end, context_len) in enumerate(self.bounds):
            if end == start:
                continue
            pages = meta.block_tables[i, : -(-context_len // spec.block_size)].long()
            k = keys[pages].flatten(0, 1)[:context_len].transpose(0, 1)
            v = values[pages].flatten(0, 1)[:context_len].transpose(0, 1)
            key_position = torch.arange(context_len, device=q.device)
            query_position = key_position[context_len - (end - start) :, None]
            mask = key_position <= query_position
            if window is not None:
                mask &= key_position > query_position - window
            out[start:end] = F.scaled_dot_product_attention(
                q[start:end].transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=spec.scale, enable_gqa=True
            )[0].transpose(0, 1)
        return out.flatten(1)
