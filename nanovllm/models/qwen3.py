"""Qwen3 (Yang et al., 2025): QK-norm, biases where the config says so, and Qwen2's sliding window."""

from __future__ import annotations

from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.models.decoder import Attention
from nanovllm.models.qwen2 import Qwen2ForCausalLM


class Qwen3ForCausalLM(Qwen2ForCausalLM):
    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        bias = self.config.attention_bias
        window = self.window(layer)
        return Attention(
            self.config, layer, rotary_emb, self.tp, qkv_bias=bias, o_bias=bias, qk_norm=True, window=window
        )
