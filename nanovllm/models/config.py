"""What differs between model families, read from a Hugging Face config into one record; and the RoPE frequencies.

To add a family whose decoder has the same skeleton, add a line to `FAMILIES`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder-only transformer (RMSNorm, SwiGLU, rotary embedding, grouped-query attention)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    tie_embeddings: bool
    rope: dict[str, Any]
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    sliding_windows: tuple[int | None, ...]  # one a layer


@dataclass(frozen=True)
class Family:
    """Where one architecture departs from the plain Llama decoder."""

    qk_norm: bool = False
    qkv_bias: bool | None = None  # None: as the config's attention_bias says
    o_bias: bool | None = None
    has_window_switch: bool = False  # the window counts only where the config's use_sliding_window is true


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(qkv_bias=False, o_bias=False),
    "Qwen2ForCausalLM": Family(qkv_bias=True, o_bias=False, has_window_switch=True),
    "Qwen3ForCausalLM": Family(qk_norm=True, has_window_switch=True),
}


def read_config(hf: Any) -> ModelConfig:
    """Raises ValueError for an architecture or a feature that this engine does not run."""
    architectures = getattr(hf, "architectures", None) or []
    name = next((a for a in architectures if a in FAMILIES), None)
    if name is None:
        raise ValueError(
            f"model: architecture {', '.join(architectures) or hf.model_type!r} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    if getattr(hf, "hidden_act", "silu") != "silu":
        raise ValueError(f"model: hidden_act={hf.hidden_act!r} is not supported; accepted is 'silu'")
    attention_bias = bool(getattr(hf, "attention_bias", False))
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rms_norm_eps=hf.rms_norm_eps,
        max_position=hf.max_position_embeddings,
        tie_embeddings=bool(hf.tie_word_embeddings),
        rope=rope_parameters(hf),
        qk_norm=family.qk_norm,
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        sliding_windows=sliding_windows(hf, family),
    )


def check_shards(config: ModelConfig, size: int) -> None:
    """Raises ValueError, with the numbers of ranks that work, for one over which the model cannot be sharded evenly."""

    def even(ranks: int) -> bool:
        heads, kv_heads = config.num_heads, config.num_kv_heads
        kv_fits = kv_heads % ranks == 0 or ranks % kv_heads == 0  # fewer than ranks: several ranks share one
        return heads % ranks == 0 and kv_fits and config.intermediate_size % ranks == 0

    if not even(size):
        works = ", ".join(str(ranks) for ranks in range(1, config.num_heads + 1) if even(ranks))
        raise ValueError(
            f"tensor_parallel_size={size} does not divide the model's {config.num_heads} attention heads, "
            f"{config.num_kv_heads} key/value heads (or is a multiple of these) and intermediate size "
            f"{config.intermediate_size} evenly; accepted are {works}"
        )


def sliding_windows(hf: Any, family: Family) -> tuple[int | None, ...]:
    window, layers = getattr(hf, "sliding_window", None), hf.num_hidden_layers
    if family.has_window_switch and not getattr(hf, "use_sliding_window", False):
        window = None
    kinds = getattr(hf, "layer_types", None)
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    full_layers = hf.max_window_layers if family.has_window_switch else 0
    return tuple(None if i < full_layers else window for i in range(layers))


def rope_parameters(hf: Any) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; 4 writes `rope_theta` and `rope_scaling`, whose type was once "type"."""
    parameters = dict(getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {})
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = getattr(hf, "rope_theta", None) or 10000.0
    return parameters


def rope_frequencies(rope: dict[str, Any], head_dim: int, max_position: int) -> tuple[Tensor, float]:
    """Radians per position of the head_dim / 2 pairs, float32, and the factor that scales cosines and sines.

    default: theta^(-2i/d) (Su et al., 2021); linear: divided by `factor` (Chen et al., 2023); llama3: low frequencies
    divided, a smooth ramp to the high ones; yarn: the ramp of Peng et al., 2023, with its attention temperature.
    """
    kind, theta = rope["rope_type"], float(rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("model: partial_rotary_factor other than 1.0 is not supported")
    pairs = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
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
    slow = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)

    def temperature(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return frequency / factor * slow + frequency * (1 - slow), temperature() if attention is None else attention


def rope_table(config: ModelConfig, length: int) -> Tensor:
    """float32 [length, head_dim]: cosines of all pairs, then sines."""
    frequency, scale = rope_frequencies(config.rope, config.head_dim, config.max_position)
    angles = torch.outer(torch.arange(length).float(), frequency)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale
