"""Rotary position embedding: the table of cosines and sines.

It also scales the frequencies for long contexts. `kernels.qk_norm_rope` or an attention
backend rotates Q and K by the angles of the table.
"""

from __future__ import annotations

import logging
import math
from typing import TypedDict

import torch
from torch import Tensor, nn

logger = logging.getLogger("nanovllm")


class RopeParameters(TypedDict, total=False):
    """`rope_parameters` of a Hugging Face config. `rope_type` and `rope_theta` are always there."""

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float
    factor: float
    original_max_position_embeddings: float
    low_freq_factor: float
    high_freq_factor: float
    beta_fast: float
    beta_slow: float
    attention_factor: float
    mscale: float
    mscale_all_dim: float
    truncate: bool
    short_factor: list[float]
    long_factor: list[float]


class RotaryEmbedding(nn.Module):
    """A table that layers share (Su et al., 2021).

    `cos_sin` is float32 [length, R]: the cosines of the R / 2 angles of each position,
    then their sines. R is head_dim, or the part of it that `partial_rotary_factor` says.
    """

    cos_sin: Tensor

    def __init__(
        self, parameters: RopeParameters, head_dim: int, max_position: int, length: int
    ) -> None:
        super().__init__()
        table = rope_table(parameters, head_dim, max_position, length)
        device = torch.get_default_device()
        self.register_buffer("cos_sin", table.to(device), persistent=False)


def rope_table(parameters: RopeParameters, head_dim: int, max_position: int, length: int) -> Tensor:
    """float32 [length, R]. The CPU computes it, so every device gets the same numbers."""
    turned = int(head_dim * parameters.get("partial_rotary_factor", 1.0))  # R
    if turned < 2 or turned % 2:
        raise ValueError(
            f"config.json: partial_rotary_factor gives RoPE {turned} numbers of a head of "
            f"{head_dim}; accepted is an even number of at least 2"
        )
    if parameters["rope_type"] == "longrope":
        frequency, scale = longrope_frequencies(parameters, turned, max_position, length)
    else:
        frequency, scale = rope_frequencies(parameters, turned, max_position)
    positions = torch.arange(length, device="cpu").float()
    angles = torch.outer(positions, frequency)  # [length, R / 2]
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale


def rope_frequencies(
    rope: RopeParameters, head_dim: int, max_position: int
) -> tuple[Tensor, float]:
    """(radians per position of each pair, factor for the table); [head_dim / 2] float32.

    default: theta^(-2i/d) (Su et al., 2021). linear: divided by `factor` (Chen et al.,
    2023). llama3: low frequencies are divided, with a linear ramp to the high ones. yarn:
    the ramp of Peng et al., 2023, and the attention temperature as the factor for the
    table.
    """
    kind = rope["rope_type"]
    theta = float(rope["rope_theta"])
    pairs = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequency = 1.0 / theta**pairs
    if kind == "default":
        return frequency, 1.0
    if kind == "linear":
        return frequency / rope["factor"], 1.0
    if kind == "llama3":
        return llama3_frequencies(rope, frequency), 1.0
    if kind == "yarn":
        scale = yarn_scale(rope, max_position)
        return yarn_frequencies(rope, frequency, head_dim, max_position), scale
    raise ValueError(
        f"model: rope type {kind!r} is not supported; "
        "supported are default, linear, llama3 and yarn"
    )


def longrope_frequencies(
    rope: RopeParameters, head_dim: int, max_position: int, length: int
) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al., 2024): each frequency has a divisor, and the table a factor.

    There are two sets of divisors. One table serves all lengths, because pages hold
    turned keys: sequences that may exceed the trained context have the long divisors,
    from their first token on. transformers changes the set in the middle of a sequence.
    """
    trained = rope["original_max_position_embeddings"]
    name = "long_factor" if length > trained else "short_factor"
    divisors = rope["long_factor"] if length > trained else rope["short_factor"]
    if len(divisors) != head_dim // 2:
        raise ValueError(
            f"config.json: {name} has {len(divisors)} numbers; accepted are {head_dim // 2}, one "
            "for each pair that RoPE turns"
        )
    if length > trained:
        logger.warning(
            "RoPE has its long factors, because max_model_len=%d is above %d; shorter texts are "
            "better with max_model_len=%d",
            length,
            trained,
            trained,
        )
    pairs = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequency = 1.0 / (torch.tensor(divisors, device="cpu").float() * rope["rope_theta"] ** pairs)
    extended = rope.get("factor") or max_position / trained
    scale = 1.0
    if extended > 1:
        scale = math.sqrt(1 + math.log(extended) / math.log(trained))
    return frequency, rope.get("attention_factor") or scale


def llama3_frequencies(rope: RopeParameters, frequency: Tensor) -> Tensor:
    """Divides the frequencies of pairs that rotate few times over the trained context."""
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    rotations = trained * frequency / (2 * math.pi)  # over the trained context
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / rope["factor"] + keep * frequency


def yarn_context(rope: RopeParameters, max_position: int) -> tuple[float, float]:
    """(trained context, factor by which YaRN extends it)."""
    trained = rope.get("original_max_position_embeddings") or max_position
    factor = rope.get("factor") or max_position / trained
    return trained, factor


def yarn_frequencies(
    rope: RopeParameters, frequency: Tensor, head_dim: int, max_position: int
) -> Tensor:
    """Divides low frequencies by the factor, with a linear ramp over pairs to the high ones."""
    trained, factor = yarn_context(rope, max_position)

    def pair_of(rotations: float) -> float:
        """The (fractional) pair that rotates this many times over the trained context."""
        wavelengths = math.log(trained / (rotations * 2 * math.pi))
        return head_dim * wavelengths / (2 * math.log(rope["rope_theta"]))

    low = pair_of(rope.get("beta_fast") or 32)
    high = pair_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, head_dim - 1)
    pair = torch.arange(head_dim // 2, device="cpu").float()
    slow = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency / factor * slow + frequency * (1 - slow)


def yarn_scale(rope: RopeParameters, max_position: int) -> float:
    """The attention temperature of YaRN, as a factor for cosines and sines."""
    _, factor = yarn_context(rope, max_position)

    def temperature(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = rope.get("attention_factor")
    if attention is not None:
        return attention
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature()
