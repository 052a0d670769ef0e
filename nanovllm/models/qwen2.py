"""Qwen2 (Yang et al., 2024): biases on Q, K and V only, and a sliding window that has a switch."""

from __future__ import annotations

from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.models.decoder import Attention, CausalLM


class Qwen2ForCausalLM(CausalLM):
    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        window = self.window(layer)
        return Attention(self.config, layer, rotary_emb, self.tp, qkv_bias=True, o_bias=False, window=window)

    def window(self, layer: int) -> int | None:
        """Only with use_sliding_window, and without layer_types only from layer max_window_layers on."""
        config = self.config
        if not config.use_sliding_window:
            return None
        if not config.layer_types and layer < config.max_window_layers:
            return None
        return super().window(layer)
