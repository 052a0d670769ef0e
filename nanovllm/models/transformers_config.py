"""The config of a model that runs as transformers' own code.

transformers reads its config itself. The engine needs a few sizes of it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanovllm.layers.rotary import RopeParameters
from nanovllm.loader.fields import Fields, is_integer
from nanovllm.models.config import ModelConfig, rope_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger("nanovllm")

LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "n_ctx",
    "max_target_positions",
)
UNKNOWN_LENGTH = 2048  # tokens
UNSCALED: RopeParameters = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class TransformersConfig(ModelConfig):
    """The sizes, and transformers' own config.

    A size that differs between layers is that of the first layer.
    """

    hf: Any = None  # a PretrainedConfig
    hf_architecture: str = ""  # the name of transformers' class
    trust_remote_code: bool = False


def read_transformers_config(
    hf: PretrainedConfig, fields: Fields, architecture: str, trust_remote_code: bool
) -> TransformersConfig:
    """Raises ValueError, naming the field, for a config without a size that the engine needs."""
    text = hf.get_text_config()
    inner = Fields(fields.source, lambda name: attribute(text, name))
    hidden_size = size(inner, "hidden_size", 1)
    num_heads = size(inner, "num_attention_heads", 1)
    head_dim = max(hidden_size // num_heads, 1)
    num_layers = size(inner, "num_hidden_layers", 1)
    is_tied = attribute(hf, "tie_word_embeddings")
    if is_tied is None:
        is_tied = attribute(text, "tie_word_embeddings")
    if hf.is_encoder_decoder:
        raise ValueError(
            f"{fields.source}: architectures: {architecture!r} is an encoder-decoder; accepted are "
            "decoders"
        )
    return TransformersConfig(
        vocab_size=inner.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size(inner, "intermediate_size", num_heads),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=size(inner, "num_key_value_heads", num_heads),
        head_dim=size(inner, "head_dim", head_dim),
        rms_norm_eps=0.0,
        max_position=longest(inner),
        tie_embeddings=bool(is_tied),
        rope=rope_of(inner),
        attention_bias=False,
        mlp_bias=False,
        sliding_windows=(None,) * num_layers,
        hf=hf,
        hf_architecture=architecture,
        trust_remote_code=trust_remote_code,
    )


def attribute(config: PretrainedConfig, name: str) -> Any:
    """A field, or None. Some fields raise if they differ between layers."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers has a type of its own for it
        return None


def size(fields: Fields, name: str, default: int) -> int:
    """A size, or the first of one size a layer. Without such a field the default.

    The sizes of attention are learnt from the model; these serve for checks before it is
    made.
    """
    value = fields.get(name)
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if is_integer(value) and value > 0 else default


def longest(fields: Fields) -> int:
    """Tokens of the longest sequence that the model was made for."""
    for name in LENGTHS:
        value = fields.get(name)
        if is_integer(value) and value > 0:
            return value
    logger.warning(
        "%s: no field states the longest sequence; max_model_len is at most %d (pass hf_overrides "
        "with %s to raise it)",
        fields.source,
        UNKNOWN_LENGTH,
        LENGTHS[0],
    )
    return UNKNOWN_LENGTH


def rope_of(fields: Fields) -> RopeParameters:
    """The scaling of RoPE, where it changes the longest sequence."""
    try:
        return rope_parameters(fields)
    except ValueError:
        return UNSCALED  # transformers computes the angles; `longest` is the limit


def model_class(config: TransformersConfig) -> type[PreTrainedModel]:
    """transformers' class of the architecture, or the class in the checkpoint's own code.

    Raises ValueError for an architecture that neither has.
    """
    import transformers

    name = config.hf_architecture
    reference = (getattr(config.hf, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if reference is not None and config.trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(reference, config.hf.name_or_path)
    found = getattr(transformers, name, None)
    if found is None:
        hint = "" if reference is None else "; its own code needs trust_remote_code=True"
        raise ValueError(f"model: transformers {transformers.__version__} has no {name}{hint}")
    return found
