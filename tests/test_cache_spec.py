"""What layers remember is declared by the model, and pages and memory follow from the declaration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from nanovllm.attention.base import AttentionSpec
from nanovllm.attention.torch_backend import TorchAttention
from nanovllm.cache.spec import CacheSpec, PagedKV, RowState, row_bytes
from nanovllm.runner import memory

# A layer with pages, one with a state of 4 * 8 + 16 bfloat16 numbers a sequence, and one with pages and a window.
MIXED: list[CacheSpec] = [
    PagedKV(4, 2, 32),
    RowState(((4, 8), (16,)), torch.bfloat16),
    PagedKV(4, 2, 32, 7),
]


def spec_of(layers: list[CacheSpec]) -> AttentionSpec:
    cpu = torch.device("cpu")
    return AttentionSpec.of(layers, block_size=16, dtype=torch.float32, device=cpu)


def test_a_page_holds_the_layers_that_have_pages() -> None:
    spec = spec_of(MIXED)
    assert spec.layers == (PagedKV(4, 2, 32), PagedKV(4, 2, 32, 7))
    assert spec.layers[0].score_scale == 32**-0.5
    assert (
        TorchAttention(spec).page_bytes() == 2 * 2 * 16 * 2 * 32 * 4
    )  # K and V, layers, tokens, heads, dim, bytes


def test_a_page_holds_layers_of_several_shapes() -> None:
    spec = spec_of([PagedKV(4, 2, 32), PagedKV(4, 4, 32, value_dim=16)])
    numbers = 2 * (32 + 32) + 4 * (32 + 16)  # of one token
    assert TorchAttention(spec).page_bytes() == 16 * numbers * 4


def test_states_of_fixed_size_take_memory_from_pages() -> None:
    assert row_bytes(MIXED) == (4 * 8 + 16) * 2

    def blocks(layers: list[CacheSpec]) -> int:
        backend = TorchAttention(spec_of(layers))
        args = SimpleNamespace(
            num_gpu_blocks_override=None, kv_cache_memory_bytes=100 * backend.page_bytes()
        )
        model = SimpleNamespace(cache_specs=lambda: layers)
        setup = SimpleNamespace(args=args, max_model_len=64, max_num_seqs=256, block_size=16)
        runner: Any = SimpleNamespace(
            setup=setup, attention=backend, model=model, device=torch.device("cpu")
        )
        return memory.num_blocks(runner)

    assert blocks([layer for layer in MIXED if isinstance(layer, PagedKV)]) == 100
    assert blocks(MIXED) == 98  # 256 sequences of 96 bytes are a page and a half
