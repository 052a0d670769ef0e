"""Gemma 3 text (Gemma Team, 2025): Gemma 2 with QK-norm, and two RoPE bases.

The layers without a window have a larger base.
"""

from __future__ import annotations

from dataclasses import replace

from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.loader.fields import Fields
from nanovllm.models.config import ropes_by_layer_type
from nanovllm.models.decoder import Attention
from nanovllm.models.gemma2 import (
    OFFSET,
    Gemma2ForCausalLM,
    GemmaAttention,
    GemmaConfig,
    read_gemma,
)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    @classmethod
    def read_config(cls, fields: Fields) -> GemmaConfig:
        full_every = fields.integer("sliding_window_pattern", default=6)
        ropes = ropes_by_layer_type(fields, "rope_local_base_freq", default=10000.0)
        config = read_gemma(fields, full_every, ropes)
        return replace(config, score_softcap=None)  # transformers reads the field no more

    def attention(self, layer: int, rotary_emb: RotaryEmbedding) -> Attention:
        attention = GemmaAttention(self, layer, rotary_emb)
        attention.q_norm = self.head_norm()
        attention.k_norm = self.head_norm()
        return attention

    def head_norm(self) -> RMSNorm:
        sizes = (self.config.head_dim, self.config.rms_norm_eps)
        return RMSNorm(*sizes, OFFSET, round_once=True)


class Gemma3TextModel(Gemma3ForCausalLM):
    """The same model, saved without its output head, which is the embedding."""
