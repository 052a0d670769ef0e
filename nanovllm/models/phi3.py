"""Phi-3 and Phi-4 (Abdin et al., 2024): fused projections in checkpoints, and RoPE on a part
of each head where the config says so.
"""

from __future__ import annotations

from torch import nn

from nanovllm.layers.linear import FusedColumnParallelLinear
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.fields import Fields
from nanovllm.models.config import (
    ModelConfig,
    Ropes,
    read_sizes,
    read_sliding_windows,
    rope_parameters,
)
from nanovllm.models.decoder import MLP, Attention, CausalLM


class FusedAttention(Attention):
    projection = FusedColumnParallelLinear


class FusedMLP(MLP):
    projection = FusedColumnParallelLinear


class Phi3ForCausalLM(CausalLM):
    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        ropes = Ropes(rope_parameters(fields, partial=True))
        return read_sizes(fields, sliding_windows=read_sliding_windows(fields), ropes=ropes)

    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        return FusedAttention(self.config, layer, rotary_emb, self.tp, qkv_bias=False, o_bias=False)

    def mlp(self, layer: int) -> nn.Module:
        return FusedMLP(self.config, self.tp)
