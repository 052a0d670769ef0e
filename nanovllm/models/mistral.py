"""Mistral (Jiang et al., 2023): no biases, and a sliding window where the config has one."""

from __future__ import annotations

from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.fields import Fields
from nanovllm.models.config import ModelConfig, read_sizes, read_sliding_windows
from nanovllm.models.decoder import Attention, CausalLM


class MistralForCausalLM(CausalLM):
    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        return read_sizes(fields, sliding_windows=read_sliding_windows(fields))

    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        return Attention(self.config, layer, rotary_emb, self.tp, qkv_bias=False, o_bias=False)
