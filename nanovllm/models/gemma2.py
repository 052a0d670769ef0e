"""Gemma 2 (Gemma Team, 2024).

Norms before and after both parts of a layer, softcaps of scores and of logits, windows on
every second layer, GeGLU, and scaled embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.attention.base import AttentionBackend
from nanovllm.cache.spec import CacheSpec, PagedKV
from nanovllm.layers.linear import ScaledEmbedding
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.fields import Fields
from nanovllm.models.config import GELU, ModelConfig, Ropes, read_sizes, read_sliding_windows
from nanovllm.models.decoder import MLP, Attention, CausalLM

OFFSET = 1.0  # The factors of Gemma's norms are 1 + weight.


@dataclass(frozen=True)
class GemmaConfig(ModelConfig):
    """Sizes, and the numbers that scale and cap scores and logits."""

    query_pre_attn_scalar: float = 1.0  # scores are divided by its root
    score_softcap: float | None = None
    logit_softcap: float | None = None


def read_gemma(fields: Fields, full_every: int, ropes: Ropes | None = None) -> GemmaConfig:
    """full_every: each layer whose number, from 1, it divides has no window."""
    if fields.flag("use_bidirectional_attention"):
        raise fields.refuse("use_bidirectional_attention", "false: a text is generated in order")
    sizes = read_sizes(
        fields,
        activation=GELU,
        attention_bias=fields.flag("attention_bias"),
        sliding_windows=read_sliding_windows(fields, full_every=full_every),
        ropes=ropes,
    )
    return GemmaConfig(
        **vars(sizes),
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar"),
        score_softcap=softcap(fields, "attn_logit_softcapping"),
        logit_softcap=softcap(fields, "final_logit_softcapping"),
    )


def softcap(fields: Fields, name: str) -> float | None:
    return None if fields.get(name) is None else fields.number(name)


class GemmaAttention(Attention):
    def __init__(self, model: Gemma2ForCausalLM, layer: int, rotary_emb: RotaryEmbedding) -> None:
        config = model.config
        bias = config.attention_bias
        super().__init__(config, layer, rotary_emb, model.tp, qkv_bias=bias, o_bias=bias)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.score_softcap

    def cache_spec(self) -> CacheSpec:
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim)
        return PagedKV(*sizes, self.window, scale=self.scale, softcap=self.softcap)


class GeGLU(MLP):
    """Feed-forward with GELU in place of SwiGLU's SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down_proj(kernels.gelu_and_mul(self.gate_up_proj(x)))


class GemmaLayer(nn.Module):
    """Attention, then MLP. Each has a norm before it, a norm after it, and a residual around."""

    def __init__(self, model: Gemma2ForCausalLM, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = model.norm()
        self.self_attn = self_attn
        self.post_attention_layernorm = model.norm()
        self.pre_feedforward_layernorm = model.norm()
        self.mlp = mlp
        self.post_feedforward_layernorm = model.norm()

    def forward(
        self, x: Tensor, residual: Tensor | None, attention: AttentionBackend
    ) -> tuple[Tensor, Tensor]:
        """As `DecoderLayer.forward`."""
        if residual is None:
            residual = x
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.post_attention_layernorm(self.self_attn(x, attention))
        x, residual = self.pre_feedforward_layernorm.add(x, residual)
        return self.post_feedforward_layernorm(self.mlp(x)), residual


class Gemma2ForCausalLM(CausalLM):
    config: GemmaConfig

    @classmethod
    def read_config(cls, fields: Fields) -> GemmaConfig:
        return read_gemma(fields, full_every=2)

    def embedding(self) -> ScaledEmbedding:
        sizes = (self.config.vocab_size, self.config.hidden_size)
        return ScaledEmbedding(*sizes, self.tp, factor=self.config.hidden_size**0.5)

    def norm(self) -> RMSNorm:
        sizes = (self.config.hidden_size, self.config.rms_norm_eps)
        return RMSNorm(*sizes, OFFSET, round_once=True)

    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        return GemmaAttention(self, layer, rotary_emb)

    def mlp(self, layer: int) -> nn.Module:
        return GeGLU(self.config, self.tp)

    def decoder_layer(self, self_attn: nn.Module, mlp: nn.Module) -> nn.Module:
        return GemmaLayer(self, self_attn, mlp)

    def logits(self, hidden: Tensor) -> Tensor:
        """[K, hidden] -> [K, vocabulary]."""
        logits = super().logits(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else kernels.softcap(logits, cap)
