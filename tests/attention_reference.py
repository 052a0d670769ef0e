"""The oracle for every attention backend: paged causal attention written out in float32, and ragged cases to try it on."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, AttentionSpec
from nanovllm.cache.spec import PagedKV
from nanovllm.core.batch import AttentionMetadata, ceil_div


@dataclass
class Case:
    """Sequences with whole K and V histories; the last `query_lens[i]` tokens of sequence i are this step's queries."""

    spec: AttentionSpec
    query_lens: list[int]
    context_lens: list[int]
    q: list[Tensor]  # [query_len, Hq, D] a sequence
    k: list[Tensor]  # [context_len, Hkv, D] a sequence
    v: list[Tensor]
    block_tables: Tensor  # [S, max_blocks] int32
    num_blocks: int
    sinks: Tensor | None = None  # [Hq]

    def metadata(self, begins: list[int], ends: list[int]) -> AttentionMetadata[Tensor]:
        """A step that computes positions begins[i]:ends[i] of sequence i."""
        size, device = self.spec.block_size, self.spec.device
        positions = [torch.arange(a, b) for a, b in zip(begins, ends)]
        slots = [
            self.block_tables[i, p // size].cpu().long() * size + p % size
            for i, p in enumerate(positions)
        ]
        lengths = [b - a for a, b in zip(begins, ends)]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        return AttentionMetadata(
            positions=torch.cat(positions).int().to(device),
            slot_mapping=torch.cat(slots).int().to(device),
            query_start=starts.int().to(device),
            context_lens=torch.tensor(ends, dtype=torch.int32, device=device),
            block_tables=self.block_tables,
            max_query_len=max(lengths),
            num_prefills=sum(length > 1 for length in lengths),
            max_context_len=max(ends),
        )

    def run(self, backend: AttentionBackend, layer: int) -> Tensor:
        """Stores the past in one step, then this step's K/V, and attends: [T, Hq * D]."""
        past = [c - n for c, n in zip(self.context_lens, self.query_lens)]
        backend.allocate(self.num_blocks)
        if any(past):
            backend.begin(self.metadata([0] * len(past), past))
            backend.store(
                layer, *(torch.cat([x[:p] for x, p in zip(xs, past)]) for xs in (self.k, self.v))
            )
        backend.begin(self.metadata(past, self.context_lens))
        backend.store(
            layer, *(torch.cat([x[p:] for x, p in zip(xs, past)]) for xs in (self.k, self.v))
        )
        return backend.attend(layer, torch.cat(self.q), self.sinks)

    def expected(self, layer: int) -> Tensor:
        """softmax(q k^T * scale) v over the visible keys, in float32: [T, Hq * D]."""
        spec = self.spec.layers[layer]
        group = spec.num_heads // spec.num_kv_heads
        window = spec.window
        outs = []
        for q, k, v, context_len in zip(self.q, self.k, self.v, self.context_lens):
            k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q.float(), k) * spec.score_scale
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            at = torch.arange(context_len - len(q), context_len, device=q.device)[:, None]
            key = torch.arange(context_len, device=q.device)
            visible = (key <= at) & (key > at - (window or context_len))
            scores = scores.masked_fill(~visible, float("-inf"))
            if self.sinks is not None:
                sinks = self.sinks.float()[:, None, None].expand(-1, len(q), 1)
                scores = torch.cat((scores, sinks), -1)
            weights = scores.softmax(-1)[..., :context_len]
            outs.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        return torch.cat(outs)


def make_case(
    query_lens: list[int],
    context_lens: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    block_size: int = 16,
    windows: tuple[int | None, ...] = (None,),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    value_dim: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> Case:
    """A case with random contents whose pages are scattered over the cache in random order."""
    generator, shuffle = torch.Generator().manual_seed(seed), random.Random(seed)
    where = torch.device(device)
    layers = tuple(
        PagedKV(*heads, head_dim, window, value_dim, softcap=softcap, has_sinks=sinks)
        for window in windows
    )
    spec = AttentionSpec(layers, block_size, dtype, where)

    def normal(tokens: int, num_heads: int, size: int = head_dim) -> Tensor:
        return torch.randn(tokens, num_heads, size, generator=generator).to(where, dtype)

    needed = [ceil_div(c, block_size) for c in context_lens]
    num_blocks = sum(needed) + 3
    free = shuffle.sample(range(num_blocks), num_blocks)
    tables = torch.zeros(len(context_lens), max(needed) + 2, dtype=torch.int32)
    for row, count in zip(tables, needed):
        row[:count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    return Case(
        spec,
        query_lens,
        context_lens,
        [normal(n, heads[0]) for n in query_lens],
        [normal(c, heads[1]) for c in context_lens],
        [normal(c, heads[1], layers[0].value_size) for c in context_lens],
        tables.to(where),
        num_blocks,
        normal(1, heads[0], 1).flatten() if sinks else None,
    )
