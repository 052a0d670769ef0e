"""The sizes of a model, read from a Hugging Face config into one record. What a family does with them is in its own file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanovllm.models.registry import MODELS


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder-only transformer (RMSNorm, SwiGLU, rotary embedding, grouped-query attention)."""

    architecture: str  # one of registry.MODELS
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
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    use_sliding_window: bool  # families that have no such switch always use the window
    max_window_layers: (
        int  # where layer_types is empty, the first layer of a family with the switch that has the window
    )
    layer_types: tuple[str, ...]  # one a layer, or empty


def read_config(hf: Any) -> ModelConfig:
    """Raises ValueError for an architecture or a feature that this engine does not run."""
    architectures = getattr(hf, "architectures", None) or []
    name = next((a for a in architectures if a in MODELS), None)
    if name is None:
        raise ValueError(
            f"model: architecture {', '.join(architectures) or hf.model_type!r} is not supported; "
            f"supported are {', '.join(MODELS)}"
        )
    if getattr(hf, "hidden_act", "silu") != "silu":
        raise ValueError(f"model: hidden_act={hf.hidden_act!r} is not supported; accepted is 'silu'")
    return ModelConfig(
        architecture=name,
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
        attention_bias=bool(getattr(hf, "attention_bias", False)),
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        sliding_window=getattr(hf, "sliding_window", None),
        use_sliding_window=bool(getattr(hf, "use_sliding_window", False)),
        max_window_layers=getattr(hf, "max_window_layers", None) or 0,
        layer_types=tuple(getattr(hf, "layer_types", None) or ()),
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


def rope_parameters(hf: Any) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; 4 writes `rope_theta` and `rope_scaling`, whose type was once "type"."""
    parameters = dict(getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {})
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = getattr(hf, "rope_theta", None) or 10000.0
    return parameters
