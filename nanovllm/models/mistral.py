"""Mistral (Jiang et al., 2023): Llama without biases, with a sliding window where the config has one."""

from __future__ import annotations

from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.models.decoder import Attention, CausalLM


class MistralForCausalLM(CausalLM):
    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        window = self.window(layer)
        return Attention(self.config, layer, rotary_emb, self.tp, qkv_bias=False, o_bias=False, window=window)
