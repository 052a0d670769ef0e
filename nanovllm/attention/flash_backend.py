"""Paged attention by an installed flash-attn package.

Version 3 runs on Hopper, version 2 on other GPUs. The package computes attention. The
pages, and the kernel that writes them, are our own (`triton_ops.write_qkv`).
"""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, AttentionSpec, zeroed_pages
from nanovllm.core.batch import AttentionMetadata
from nanovllm.kernels.rope import Rope
from nanovllm.kernels.triton_ops import write_kv, write_qkv

PAGE = 256  # flash-attn 2 takes pages of a multiple of this
SINKS = "s_aux"  # the argument for sinks: [Hq] in the type of q


def flash_version(spec: AttentionSpec) -> tuple[int | None, str]:
    """(3 or 2, why). (None, why) where neither version can run this model."""
    if spec.device.type != "cuda" or spec.dtype not in (torch.float16, torch.bfloat16):
        where = f"{spec.dtype} on {spec.device.type}"
        return None, f"flash-attn runs float16 and bfloat16 on CUDA, not {where}"
    for layer in spec.layers:
        if layer.head_dim > 256 or layer.head_dim % 8:
            return None, f"flash-attn runs head sizes up to 256 in steps of 8, not {layer.head_dim}"
        if layer.value_size != layer.head_dim:
            sizes = f"{layer.value_size} and {layer.head_dim}"
            return None, f"flash-attn is called with values of the size of keys, not {sizes}"
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
                missing = missing_word(spec, import_module(module))
            except ImportError as error:
                reasons.append(f"{module} does not import ({error})")
            else:
                if missing is None:
                    return version, f"{module} is installed"
                reasons.append(f"the installed {module} has no {missing}")
    return None, "; ".join(reasons)


def missing_word(spec: AttentionSpec, module: ModuleType) -> str | None:
    """What a layer asks for and the functions of `module` have no argument for, or None.

    flash-attn has `softcap` since version 2.6. Some builds of version 3 have `s_aux`.
    """
    words = inspect.signature(module.flash_attn_with_kvcache).parameters
    softcap = any(layer.softcap is not None for layer in spec.layers)
    sinks = any(layer.has_sinks for layer in spec.layers)
    if softcap and "softcap" not in words:
        return "softcap of the scores"
    if sinks and SINKS not in words:
        return "sinks in the softmax"
    return None


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
        shapes = []
        for layer in spec.layers:
            page = (num_blocks, spec.block_size, layer.num_kv_heads, layer.head_dim)
            shapes.append((page, page))
        self.cache, self.pages = zeroed_pages(shapes, spec.dtype, spec.device)
        # [num_blocks, Hkv, block_size, D], as the kernel that writes them wants
        self.by_head = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in self.pages]

    def begin(self, meta: AttentionMetadata[Tensor]) -> None:
        super().begin(meta)
        if self.version == 2 and meta.max_query_len > 1:
            key_end = meta.context_lens.cumsum(0, dtype=torch.int32)  # [S]
            self.key_start = torch.nn.functional.pad(key_end, (1, 0))  # [S + 1]

    def write(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        meta = self.meta
        return write_qkv(qkv, meta.positions, meta.slot_mapping, rope, *self.by_head[layer])

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        write_kv(k, v, self.meta.slot_mapping, *self.by_head[layer])

    def attend(self, layer: int, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        meta = self.meta
        spec = self.spec.layers[layer]
        window = spec.window
        common: dict[str, object] = {
            "softmax_scale": spec.score_scale,
            "causal": True,
            "window_size": (-1, -1) if window is None else (window - 1, 0),
        }
        if spec.softcap is not None:
            common["softcap"] = spec.softcap
        if sinks is not None:
            common[SINKS] = sinks.to(q.dtype)
        if self.version == 3:
            out = self.kernels.flash_attn_with_kvcache(
                q,
                *self.pages[layer],
                cache_seqlens=meta.context_lens,
                page_table=meta.block_tables,
                cu_seqlens_q=meta.query_start,
                max_seqlen_q=meta.max_query_len,
                **common,
            )
        elif meta.max_query_len > 1:
            out = self.kernels.flash_attn_varlen_func(
                q,
                *self.pages[layer],
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
                *self.pages[layer],
                cache_seqlens=meta.context_lens,
                block_table=meta.block_tables,
                **common,
            )
        return out.reshape(len(q), -1)
