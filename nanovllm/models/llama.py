"""Llama (Touvron et al., 2023): the plain decoder. The config says whether there are biases."""

from __future__ import annotations

from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.fields import Fields
from nanovllm.models.config import ModelConfig, read_sizes
from nanovllm.models.decoder import Attention, CausalLM


class LlamaForCausalLM(CausalLM):
    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        return read_sizes(
            fields,
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
        )

    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        bias = self.config.attention_bias
        return Attention(self.config, layer, rotary_emb, self.tp, qkv_bias=bias, o_bias=bias)
