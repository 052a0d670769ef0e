"""Qwen3 (Yang et al., 2025): QK-norm, biases where the config has them, and Qwen2's windows."""

from __future__ import annotations

from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.fields import Fields
from nanovllm.models.config import ModelConfig, read_sizes
from nanovllm.models.decoder import Attention, CausalLM
from nanovllm.models.qwen2 import switched_windows


class Qwen3ForCausalLM(CausalLM):
    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        return read_sizes(
            fields,
            attention_bias=fields.flag("attention_bias"),
            sliding_windows=switched_windows(fields),
        )

    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        bias = self.config.attention_bias
        return Attention(
            self.config, layer, rotary_emb, self.tp, qkv_bias=bias, o_bias=bias, qk_norm=True
        )
