"""Qwen2 (Yang et al., 2024): biases on Q, K and V only, and a sliding window that has a switch."""

from __future__ import annotations

from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.fields import Fields
from nanovllm.models.config import ModelConfig, read_sizes, read_sliding_windows
from nanovllm.models.decoder import Attention, CausalLM


class Qwen2ForCausalLM(CausalLM):
    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        return read_sizes(fields, sliding_windows=switched_windows(fields))

    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        return Attention(self.config, layer, rotary_emb, self.tp, qkv_bias=True, o_bias=False)


def switched_windows(fields: Fields) -> tuple[int | None, ...] | None:
    """Windows only with use_sliding_window, from layer max_window_layers on."""
    if not fields.flag("use_sliding_window"):
        return None
    return read_sliding_windows(fields, first_sliding="max_window_layers")
