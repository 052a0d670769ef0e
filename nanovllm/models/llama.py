"""Llama (Touvron et al., 2023): the plain decoder. The config says whether attention has biases."""

from __future__ import annotations

from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.models.decoder import Attention, CausalLM


class LlamaForCausalLM(CausalLM):
    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        bias = self.config.attention_bias
        window = self.window(layer)
        return Attention(self.config, layer, rotary_emb, self.tp, qkv_bias=bias, o_bias=bias, window=window)
