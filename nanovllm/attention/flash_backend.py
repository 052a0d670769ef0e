"""Paged attention by an installed flash-attn package.

Version 3 runs on Hopper, version 2 on other GPUs. The package computes attention. The
pages, and the kernel that writes them, are our own (`triton_ops.write_qkv`).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, AttentionSpec
from nanovllm.core.batch import AttentionMetadata
from nanovllm.kernels.rope import Rope
from nanovllm.kernels.triton_ops import write_kv, write_qkv

PAGE = 256  # flash-attn 2 takes pages of a multiple of this


def flash_version(spec: AttentionSpec) -> tuple[int | None, str]:
    """(3 or 2, why). (None, why) where neither version can run this model."""
    if spec.device.type != "cuda" or spec.dtype not in (torch.float16, torch.bfloat16):
        where = f"{spec.dtype} on {spec.device.type}"
        return None, f"flash-attn runs float16 and bfloat16 on CUDA, not {where}"
    if spec.largest_head > 256 or spec.largest_head % 8:
        return None, f"flash-attn runs head sizes up to 256 in steps of 8, not {spec.largest_head}"
    uncommon = spec.uncommon()
    if uncommon is not None:
        return None, f"nanovllm calls flash-attn without {uncommon}"
    capability = torch.cuda.get_device_capability(spec.device)
    shown = f"{capability[0]}.{capability[1]}"
    reasons = []
    for version, module, runs in (
        (3, "flash_attn_interface", capability[0] == 9),
        (2, "flash_attn", capability >= (8, 0)),
    ):
        if not runs:
            reasons.append(f"flash-attn {version} does not run on compute capability {shown}")
        elif version == 2 and spec.block_size % PAGE:
            multiple = f"a block_size that is a multiple of {PAGE}"
            reasons.append(f"flash-attn 2 needs {multiple}, not {spec.block_size}")
        else:
            try:
                import_module(module)
            except ImportError as error:
                reasons.append(f"{module} does not import ({error})")
            else:
                return version, f"{module} is installed"
    return None, "; ".join(reasons)


class FlashAttention(AttentionBackend):
    """Pages are [num_blocks, block_size, Hkv, D], K and V apart."""

    @staticmethod
    def refuses(spec: AttentionSpec) -> str | None:
        version, why = flash_version(spec)
        return why if version is None else None

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.version, _ = flash_version(spec)
        module = "flash_attn_interface" if self.version == 3 else "flash_attn"
        self.kernels: ModuleType = import_module(module)

    def allocate(self, num_blocks: int) -> None:
        spec = self.spec
        first = spec.layers[0]
        page = (spec.block_size, first.num_kv_heads, first.head_dim)
        shape = (len(spec.layers), 2, num_blocks, *page)
        self.cache = torch.zeros(shape, dtype=spec.dtype, device=spec.device)

    def begin(self, meta: AttentionMetadata[Tensor]) -> None:
        super().begin(meta)
        if self.version == 2 and meta.max_query_len > 1:
            key_end = meta.context_lens.cumsum(0, dtype=torch.int32)  # [S]
            self.key_start = torch.nn.functional.pad(key_end, (1, 0))  # [S + 1]

    def write(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        caches = self.cache[layer].transpose(2, 3)
        return write_qkv(qkv, self.meta.positions, self.meta.slot_mapping, rope, *caches)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        write_kv(k, v, self.meta.slot_mapping, *self.cache[layer].transpose(2, 3))

    def attend(self, layer: int, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        assert sinks is None
        meta = self.meta
        spec = self.spec.layers[layer]
        window = spec.window
        common = {
            "softmax_scale": spec.score_scale,
            "causal": True,
            "window_size": (-1, -1) if window is None else (window - 1, 0),
        }
        if self.version == 3:
            out = self.kernels.flash_attn_with_kvcache(
                q,
                *self.cache[layer],
                cache_seqlens=meta.context_lens,
                page_table=meta.block_tables,
                cu_seqlens_q=meta.query_start,
                max_seqlen_q=meta.max_query_len,
                **common,
            )
        elif meta.max_query_len > 1:
            out = self.kernels.flash_attn_varlen_func(
                q,
                *self.cache[layer],
                cu_seqlens_q=meta.query_start,
                cu_seqlens_k=self.key_start,
                max_seqlen_q=meta.max_query_len,
                max_seqlen_k=meta.max_context_len,
                block_table=meta.block_tables,
                **common,
            )
        else:
            out = self.kernels.flash_attn_with_kvcache(
                q[:, None],
                *self.cache[layer],
                cache_seqlens=meta.context_lens,
                block_table=meta.block_tables,
                **common,
            )
        return out.reshape(len(q), -1)
