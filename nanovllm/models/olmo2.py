"""OLMo 2 and OLMo 3 (OLMo Team, 2024 and 2025).

Norms come after both parts of a layer, and QK-norm takes all heads at once. OLMo 3 has
windows on three layers of four, and scales RoPE on the others only.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.attention.base import AttentionBackend
from nanovllm.kernels.rope import Rope
from nanovllm.layers.heads_norm import HeadsRMSNorm
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.fields import Fields
from nanovllm.models.config import (
    ModelConfig,
    read_sizes,
    read_sliding_windows,
    ropes_by_layer_type,
)
from nanovllm.models.decoder import Attention, CausalLM


class OlmoAttention(Attention):
    q_norm: HeadsRMSNorm
    k_norm: HeadsRMSNorm

    def __init__(self, model: Olmo2ForCausalLM, layer: int, rotary_emb: RotaryEmbedding) -> None:
        config = model.config
        bias = config.attention_bias
        super().__init__(config, layer, rotary_emb, model.tp, qkv_bias=bias, o_bias=bias)
        how = (config.head_dim, config.rms_norm_eps, model.tp, model.round_once)
        self.q_norm = HeadsRMSNorm(config.num_heads, *how)
        self.k_norm = HeadsRMSNorm(config.num_kv_heads, *how)

    def forward(self, x: Tensor, attention: AttentionBackend) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        qkv = self.qkv_proj(x)  # [T, (Hq + 2 Hkv) D]
        k_start = self.num_heads * self.head_dim
        k_stop = k_start + self.num_kv_heads * self.head_dim
        self.q_norm(qkv[:, :k_start])
        self.k_norm(qkv[:, k_start:k_stop])
        q = attention.write(self.layer, qkv, self.rope())  # [T, Hq, D]
        return self.o_proj(attention.attend(self.layer, q))

    def rope(self) -> Rope:
        """RoPE alone, because `forward` has normalised Q and K."""
        return Rope(self.num_heads, self.num_kv_heads, self.head_dim, self.rotary_emb.cos_sin)


class OlmoLayer(nn.Module):
    """Attention, then MLP. Each has a norm after it, and a residual connection around both."""

    def __init__(self, model: Olmo2ForCausalLM, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.post_attention_layernorm = model.norm()
        self.mlp = mlp
        self.post_feedforward_layernorm = model.norm()

    def forward(
        self, x: Tensor, residual: Tensor | None, attention: AttentionBackend
    ) -> tuple[Tensor, Tensor]:
        """As `DecoderLayer.forward`."""
        residual = x if residual is None else kernels.add(x, residual)
        x = self.post_attention_layernorm(self.self_attn(residual, attention))
        residual = kernels.add(x, residual)
        return self.post_feedforward_layernorm(self.mlp(residual)), residual


class Olmo2ForCausalLM(CausalLM):
    round_once: ClassVar[bool] = True  # its norms; see `kernels.rms_norm`

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        return read_sizes(fields, attention_bias=fields.flag("attention_bias"))

    def norm(self) -> RMSNorm:
        sizes = (self.config.hidden_size, self.config.rms_norm_eps)
        return RMSNorm(*sizes, round_once=self.round_once)

    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        return OlmoAttention(self, layer, rotary_emb)

    def decoder_layer(self, self_attn: nn.Module, mlp: nn.Module) -> nn.Module:
        return OlmoLayer(self, self_attn, mlp)


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        return read_sizes(
            fields,
            attention_bias=fields.flag("attention_bias"),
            sliding_windows=read_sliding_windows(fields, full_every=4),
            ropes=ropes_by_layer_type(fields, "rope_theta", default=500000.0),
        )
