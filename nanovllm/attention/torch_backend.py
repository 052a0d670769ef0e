"""Paged attention in plain PyTorch, one sequence after the other.

It runs on every torch device and is fast on none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.attention.base import AttentionBackend, zeroed
from nanovllm.cache.spec import PagedKV
from nanovllm.core.batch import AttentionMetadata, ceil_div


class TorchAttention(AttentionBackend):
    """Pages are [num_blocks + 1, block_size, Hkv, D]. The last page takes the tokens of slot -1."""

    can_capture = False  # reads lengths and page ids on the host

    def allocate(self, num_blocks: int) -> None:
        # K and V of each layer
        self.cache = [self.pages_of(layer, num_blocks + 1) for layer in self.spec.layers]

    def pages_of(self, layer: PagedKV, num_pages: int) -> tuple[Tensor, Tensor]:
        spec = self.spec
        heads = (num_pages, spec.block_size, layer.num_kv_heads)
        where = (spec.dtype, spec.device)
        k = zeroed((*heads, layer.head_dim), *where)
        v = zeroed((*heads, layer.value_size), *where)
        return k, v

    def begin(self, meta: AttentionMetadata[Tensor]) -> None:
        super().begin(meta)
        self.query_start: list[int] = meta.query_start.tolist()
        self.context_lens: list[int] = meta.context_lens.tolist()
        self.slots = meta.slot_mapping.long()

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys, values = self.cache[layer]
        keys.flatten(0, 1)[self.slots] = k  # [slots, Hkv, D]
        values.flatten(0, 1)[self.slots] = v

    def attend(self, layer: int, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        out = q.new_empty(*q.shape[:2], self.spec.layers[layer].value_size)
        for i, context_len in enumerate(self.context_lens):
            queries = slice(self.query_start[i], self.query_start[i + 1])
            if queries.start < queries.stop:
                out[queries] = self.attend_one(layer, i, q[queries], context_len, sinks)
        return out.flatten(1)

    def attend_one(
        self,
        layer: int,
        sequence: int,
        q: Tensor,
        context_len: int,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of the last queries of one sequence: q [n, Hq, D] -> [n, Hq, Dv]."""
        spec = self.spec.layers[layer]
        num_pages = ceil_div(context_len, self.spec.block_size)
        pages = self.meta.block_tables[sequence, :num_pages].long()
        keys, values = self.cache[layer]
        k = keys[pages].flatten(0, 1)[:context_len].transpose(0, 1)  # [Hkv, context_len, D]
        v = values[pages].flatten(0, 1)[:context_len].transpose(0, 1)
        key_position = torch.arange(context_len, device=q.device)
        query_position = key_position[context_len - len(q) :, None]  # [n, 1]
        mask = key_position <= query_position  # [n, context_len]
        if spec.window is not None:
            mask &= key_position > query_position - spec.window
        if spec.softcap is not None or sinks is not None:
            heads = q.transpose(0, 1)  # [Hq, n, D]
            out = capped_attention(heads, k, v, mask, spec, sinks)
            return out.transpose(0, 1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k[None],
            v[None],
            attn_mask=mask,
            scale=spec.score_scale,
            enable_gqa=True,
        )  # [1, Hq, n, Dv]
        return out[0].transpose(0, 1)


def capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    spec: PagedKV,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with a softcap or sinks, which scaled_dot_product_attention lacks.

    q [Hq, n, D], k [Hkv, m, D], v [Hkv, m, Dv], mask [n, m], sinks [Hq] -> [Hq, n, Dv].
    """
    group = spec.num_heads // spec.num_kv_heads
    k = k.repeat_interleave(group, dim=0)  # [Hq, m, D]
    v = v.repeat_interleave(group, dim=0)
    products = torch.matmul(q, k.mT)  # [Hq, n, m]
    scores = products.float() * spec.score_scale
    cap = spec.softcap
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(-1, 1, 1)
        column = column.expand(-1, q.shape[1], 1)
        scores = torch.cat((scores, column), dim=-1)  # [Hq, n, m + 1]
    weights = scores.softmax(-1)
    weights = weights[..., : k.shape[1]]
    weights = weights.to(v.dtype)
    return torch.matmul(weights, v)
