"""Rotary position embedding: the table of cosines and sines, and how its frequencies are scaled for long contexts.

What turns Q and K by these angles is `kernels.qk_norm_rope`, or an attention backend.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """The table that all layers of a model share (Su et al., 2021).

    `cos_sin` is float32 [length, head_dim]: cosines of the head_dim / 2 angles of each position, then their sines.
    """

    cos_sin: Tensor

    def __init__(self, parameters: dict[str, Any], head_dim: int, max_position: int, length: int) -> None:
        super().__init__()
        table = rope_table(parameters, head_dim, max_position, length)
        self.register_buffer("cos_sin", table.to(torch.get_default_device()), persistent=False)


def rope_table(parameters: dict[str, Any], head_dim: int, max_position: int, length: int) -> Tensor:
    """float32 [length, head_dim] on the CPU, so that the numbers are the same for every device."""
    frequency, scale = rope_frequencies(parameters, head_dim, max_position)
    angles = torch.outer(torch.arange(length, device="cpu").float(), frequency)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale


def rope_frequencies(rope: dict[str, Any], head_dim: int, max_position: int) -> tuple[Tensor, float]:
    """Radians per position of the head_dim / 2 pairs, float32, and the factor that scales cosines and sines.

    default: theta^(-2i/d) (Su et al., 2021); linear: divided by `factor` (Chen et al., 2023); llama3: low frequencies
    divided, a smooth ramp to the high ones; yarn: the ramp of Peng et al., 2023, with its attention temperature.
    """
    kind, theta = rope["rope_type"], float(rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("model: partial_rotary_factor other than 1.0 is not supported")
    pairs = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequency = 1.0 / theta**pairs
    if kind == "default":
        return frequency, 1.0
    if kind == "linear":
        return frequency / rope["factor"], 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the trained context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * frequency / rope["factor"] + keep * frequency, 1.0
    if kind == "yarn":
        return yarn_frequencies(rope, frequency, head_dim, max_position)
    raise ValueError(f"model: rope type {kind!r} is not supported; supported are default, linear, llama3 and yarn")


def yarn_frequencies(rope: dict[str, Any], frequency: Tensor, head_dim: int, max_position: int) -> tuple[Tensor, float]:
    trained = rope.get("original_max_position_embeddings") or max_position
    factor = rope.get("factor") or max_position / trained

    def pair_with_turns(turns: float) -> float:
        """The (fractional) pair that turns so many times over the trained context."""
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = pair_with_turns(rope.get("beta_fast") or 32)
    high = pair_with_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    slow = ((torch.arange(head_dim // 2, device="cpu").float() - low) / max(high - low, 0.001)).clamp(0, 1)

    def temperature(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return frequency / factor * slow + frequency * (1 - slow), temperature() if attention is None else attention
