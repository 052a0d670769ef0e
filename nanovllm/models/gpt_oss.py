"""gpt-oss (OpenAI, 2025): sinks, windows in every other layer, experts with a clamped SwiGLU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovllm.attention.base import AttentionBackend
from nanovllm.cache.spec import PagedKV
from nanovllm.kernels import moe
from nanovllm.layers.linear import span
from nanovllm.layers.moe import Experts, ExpertSizes, MixtureOfExperts, Router
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.fields import Fields
from nanovllm.loader.gpt_oss import split_experts
from nanovllm.loader.source import LazyTensor, Source
from nanovllm.models.config import read_sizes, read_sliding_windows
from nanovllm.models.decoder import Attention, CausalLM
from nanovllm.models.experts import MoeConfig, with_experts
from nanovllm.parallel import TensorParallel


@dataclass(frozen=True)
class GptOssConfig(MoeConfig):
    """alpha and limit: see `kernels.moe.clamped_swiglu`."""

    alpha: float = 1.702
    limit: float = 7.0


class SinkAttention(Attention):
    """Attention with one learned score more in each head's softmax. It has no value."""

    def __init__(
        self, config: GptOssConfig, layer: int, rotary_emb: RotaryEmbedding, tp: TensorParallel
    ) -> None:
        bias = config.attention_bias
        super().__init__(config, layer, rotary_emb, tp, qkv_bias=bias, o_bias=bias)
        self.total_heads = config.num_heads
        self.heads = tp.split(config.num_heads)
        self.sinks = nn.Parameter(torch.empty(len(self.heads)), requires_grad=False)

    def sources(self, prefix: str) -> list[Source]:
        """The scores of this rank's heads."""
        shape = (self.total_heads,)
        return [Source(f"{prefix}.sinks", shape, (span(self.heads),), self.sinks)]

    def forward(self, x: Tensor, attention: AttentionBackend) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        qkv = self.qkv_proj(x)  # [T, (Hq + 2 Hkv) D]
        q = attention.write(self.layer, qkv, self.rope())  # [T, Hq, D]
        return self.o_proj(attention.attend(self.layer, q, self.sinks))

    def cache_spec(self) -> PagedKV:
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim)
        return PagedKV(*sizes, self.window, has_sinks=True)


class ClampedExperts(Experts):
    """Experts with biases and a clamped SwiGLU."""

    def __init__(self, config: GptOssConfig, sizes: ExpertSizes, tp: TensorParallel) -> None:
        super().__init__(sizes, tp, config.expert_parallel)
        self.alpha = config.alpha
        self.limit = config.limit

    def activation(self, gate_up: Tensor) -> Tensor:
        return moe.clamped_swiglu(gate_up, self.alpha, self.limit)


class GptOssForCausalLM(CausalLM):
    config: GptOssConfig

    @classmethod
    def read_config(cls, fields: Fields) -> GptOssConfig:
        sizes = read_sizes(
            fields,
            attention_bias=fields.flag("attention_bias"),
            sliding_windows=read_sliding_windows(fields),
        )
        # The softmax over the chosen experts equals that over all, made to sum to 1.
        with_sizes = with_experts(
            sizes, fields, count="num_local_experts", size="intermediate_size", renormalise=True
        )
        return GptOssConfig(
            **vars(with_sizes),
            alpha=fields.number("swiglu_alpha", default=GptOssConfig.alpha),
            limit=fields.number("swiglu_limit", default=GptOssConfig.limit),
        )

    def norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps, round_once=True)

    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        return SinkAttention(self.config, layer, rotary_emb, self.tp)

    def mlp(self, layer: int) -> nn.Module:
        config = self.config
        sizes = ExpertSizes(config.num_experts, config.hidden_size, config.expert_size, bias=True)
        router = Router(sizes, config.top_k, config.renormalise, name="router", bias=True)
        return MixtureOfExperts(router, ClampedExperts(config, sizes, self.tp))

    def checkpoint_tensors(
        self, weights: Iterable[tuple[str, LazyTensor]]
    ) -> Iterable[tuple[str, LazyTensor]]:
        return split_experts(weights)
