"""What differs between model families, read from a Hugging Face config into one record; and the RoPE frequencies.

To add a family whose decoder has the same skeleton, add a line to `FAMILIES`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm.loader.fields import Fields, is_integer, shown


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
    has_mlp_bias: bool = False  # the config's mlp_bias counts
    has_window: bool = True  # the config's sliding_window counts
    has_window_switch: bool = False  # the window counts only where the config's use_sliding_window is true


FAMILIES = {
    "LlamaForCausalLM": Family(has_mlp_bias=True, has_window=False),
    "MistralForCausalLM": Family(qkv_bias=False, o_bias=False),
    "Qwen2ForCausalLM": Family(qkv_bias=True, o_bias=False, has_window_switch=True),
    "Qwen3ForCausalLM": Family(qk_norm=True, has_window_switch=True),
}
# For a config that names no architecture. transformers 5 turns a mistral with layer_types into a ministral.
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ACTIVATIONS = ("silu", "swish")  # two names of one function


def read_config(hf: Any, source: str | Path = "config.json") -> ModelConfig:
    """Raises ValueError, naming `source` and the field, for an architecture, a feature or a value that does not run."""
    fields = Fields(source, lambda name: getattr(hf, name, None))
    refuse_quantised(fields)
    family = FAMILIES[architecture(fields)]
    if fields.get("hidden_act") not in (None, *ACTIVATIONS):
        raise fields.refuse("hidden_act", "'silu' (or its other name, 'swish')")
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}")
    head_dim = fields.integer("head_dim", default=hidden_size // heads)
    if head_dim % 2:
        raise ValueError(f"{source}: head_dim is {head_dim}; accepted is an even number, because RoPE turns pairs")
    biases = family.qkv_bias is None and fields.flag("attention_bias")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", zero=True),
        max_position=fields.integer("max_position_embeddings"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        rope=rope_parameters(fields),
        qk_norm=family.qk_norm,
        qkv_bias=biases if family.qkv_bias is None else family.qkv_bias,
        o_bias=biases if family.o_bias is None else family.o_bias,
        mlp_bias=family.has_mlp_bias and fields.flag("mlp_bias"),
        sliding_windows=sliding_windows(fields, family),
    )


def architecture(fields: Fields) -> str:
    """The first supported name of `architectures`; where the config lists none, the one of its model_type."""
    listed = fields.get("architectures")
    if listed is None or listed == []:
        if fields.get("model_type") not in MODEL_TYPES:
            raise fields.refuse("model_type", f"one of {', '.join(MODEL_TYPES)}, as architectures is missing")
        return MODEL_TYPES[fields.get("model_type")]
    names = [listed] if isinstance(listed, str) else listed
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise fields.refuse("architectures", "a list of names such as 'LlamaForCausalLM'")
    known = [name for name in names if name in FAMILIES]
    if not known:
        raise ValueError(
            f"{fields.source}: architectures: {', '.join(map(repr, names))} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    return known[0]


def refuse_quantised(fields: Fields) -> None:
    """Raises ValueError for a config that says that its weights are quantised."""
    for name in ("quantization_config", "compression_config"):  # the second is what compressed-tensors once wrote
        found = fields.get(name)
        found = found.to_dict() if hasattr(found, "to_dict") else found
        if found in (None, {}, {"quant_method": None}):
            continue
        method = found.get("quant_method") if isinstance(found, dict) else found
        if method != "none":
            raise ValueError(
                f"{fields.source}: {name}: quant_method is {method!r}; quantised checkpoints other than GGUF "
                "are not supported, give the model in float32, float16 or bfloat16"
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


def sliding_windows(fields: Fields, family: Family) -> tuple[int | None, ...]:
    """The window of each layer, in tokens; None for a layer that sees the whole context."""
    layers = fields.integer("num_hidden_layers")
    if not family.has_window or (family.has_window_switch and not fields.flag("use_sliding_window")):
        return (None,) * layers
    kinds = layer_types(fields, layers, family)
    no_window = fields.get("sliding_window") is None and fields.get("layer_types") is None
    if no_window or "sliding_attention" not in kinds:
        return (None,) * layers
    window = fields.integer("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def layer_types(fields: Fields, layers: int, family: Family) -> list[str]:
    """`layer_types`; where it is missing, the first max_window_layers of Qwen's layers are full, all others sliding."""
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.get("max_window_layers") if family.has_window_switch else 0
        if not is_integer(first):
            raise fields.refuse("max_window_layers", "an integer")
        return ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    accepted = ("full_attention", "sliding_attention")
    if not isinstance(kinds, (list, tuple)) or len(kinds) != layers or any(kind not in accepted for kind in kinds):
        raise fields.refuse("layer_types", f"a list of {layers} of 'full_attention' and 'sliding_attention'")
    return list(kinds)


# The numbers of each rope type: those that it must have, and those that it may have.
ROPE_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        (),
        (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
        ),
    ),
}


def rope_parameters(fields: Fields) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; 4 writes `rope_theta` and `rope_scaling`, whose type was once "type"."""
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    given = fields.get(name) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise fields.refuse(name, "one set of RoPE parameters for all layers")
    given = {key: value for key, value in given.items() if value is not None}
    given.setdefault("rope_type", given.get("type", "default"))
    if given["rope_type"] not in ROPE_NUMBERS:
        raise ValueError(
            f"{fields.source}: {name}: rope_type is {shown(given['rope_type'])}; supported are {', '.join(ROPE_NUMBERS)}"
        )
    if "rope_theta" not in given:
        given["rope_theta"] = fields.number("rope_theta", default=10000.0)
    inner = Fields(f"{fields.source}: {name}", given.get)
    if inner.number("partial_rotary_factor", default=1.0) != 1.0:
        raise inner.refuse("partial_rotary_factor", "1.0")
    required, optional = ROPE_NUMBERS[given["rope_type"]]
    for key in ("rope_theta", *required, *(key for key in optional if key in given)):
        given[key] = inner.number(key, zero=key.startswith("mscale"))
    return given


def rope_frequencies(rope: dict[str, Any], head_dim: int, max_position: int) -> tuple[Tensor, float]:
    """Radians per position of the head_dim / 2 pairs, float32, and the factor that scales cosines and sines.

    default: theta^(-2i/d) (Su et al., 2021); linear: divided by `factor` (Chen et al., 2023); llama3: low frequencies
    divided, a smooth ramp to the high ones; yarn: the ramp of Peng et al., 2023, with its attention temperature.
    """
    kind, theta = rope["rope_type"], float(rope["rope_theta"])
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
    assert kind == "yarn"
    return yarn_frequencies(rope, frequency, head_dim, max_position)


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
