"""The sizes of a model, read from a Hugging Face config into one record.

The file of a family says how it uses them and which further fields it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

from nanovllm.layers.rotary import RopeParameters
from nanovllm.loader.fields import Fields, is_integer, is_number, shown

LAYER_TYPES = ("full_attention", "sliding_attention")
READ_QUANTISED = {"gpt_oss": "mxfp4"}  # model_type -> the format that its family reads


class Activation(NamedTuple):
    """A function of the feed-forward: the field that names it, and its names."""

    field: str
    names: tuple[str, ...]
    accepted: str  # the names, for an error


SILU = Activation("hidden_act", ("silu", "swish"), "'silu' (or its other name, 'swish')")
GELU = Activation("hidden_activation", ("gelu_pytorch_tanh",), "'gelu_pytorch_tanh'")


class Ropes(NamedTuple):
    """RoPE of all layers, or of layers without a window and of those with one."""

    full: RopeParameters
    sliding: RopeParameters | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder-only transformer.

    It has RMSNorm, SwiGLU, rotary embedding and grouped-query attention.
    """

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
    rope: RopeParameters
    attention_bias: bool
    mlp_bias: bool
    # One a layer, in tokens. None: the layer sees the whole context.
    sliding_windows: tuple[int | None, ...]
    architecture: str = ""  # one of registry.MODELS
    quantization: str | None = None  # the format of quantised weights in the checkpoint
    expert_parallel: bool = False  # ranks share experts, if there are any, instead of their sizes
    # RoPE of layers with a window. None: it is `rope`.
    sliding_rope: RopeParameters | None = None
    is_multimodal: bool = False  # the checkpoint has towers for images, which are not read

    @property
    def has_experts(self) -> bool:
        """Whether some layer is a mixture of experts."""
        return False

    def sharded_sizes(self) -> dict[str, int]:
        """What the ranks share besides attention heads: what it is -> its number."""
        return {"intermediate size": self.intermediate_size}


def read_sizes(
    fields: Fields,
    *,
    activation: Activation = SILU,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    sliding_windows: tuple[int | None, ...] | None = None,
    ropes: Ropes | None = None,
) -> ModelConfig:
    """The sizes that all families have.

    The other arguments are for families whose configs have such fields. Raises
    ValueError, naming file and field, for a bad value.
    """
    if fields.get(activation.field) not in (None, *activation.names):
        raise fields.refuse(activation.field, activation.accepted)
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        divisor = f"a divisor of num_attention_heads, which is {num_heads}"
        raise fields.refuse("num_key_value_heads", divisor)
    head_dim = fields.integer("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        raise ValueError(
            f"{fields.source}: head_dim is {head_dim}; accepted is an even number, because RoPE "
            "turns pairs"
        )
    num_layers = fields.integer("num_hidden_layers")
    ropes = ropes or Ropes(rope_parameters(fields))
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", zero=True),
        max_position=fields.integer("max_position_embeddings"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        rope=ropes.full,
        sliding_rope=ropes.sliding,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        sliding_windows=sliding_windows or (None,) * num_layers,
    )


def read_sliding_windows(
    fields: Fields, first_sliding: str | None = None, full_every: int | None = None
) -> tuple[int | None, ...] | None:
    """The window of each layer. None where no layer has a window.

    Two arguments are for a config without `layer_types`. first_sliding: the field that
    names the first layer with a window. full_every: each layer whose number, counted from
    1, it divides has no window. Without either all layers have the window.
    """
    types = layer_types(fields, first_sliding, full_every)
    is_unset = fields.get("sliding_window") is None and fields.get("layer_types") is None
    if is_unset or "sliding_attention" not in types:
        return None
    window = fields.integer("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def layer_types(fields: Fields, first_sliding: str | None, full_every: int | None) -> list[str]:
    """`layer_types`, or else what the arguments of `read_sliding_windows` say."""
    num_layers = fields.integer("num_hidden_layers")
    types = fields.get("layer_types")
    if types is None and full_every is not None:
        full, sliding = LAYER_TYPES
        return [sliding if layer % full_every else full for layer in range(1, num_layers + 1)]
    if types is None:
        first = 0 if first_sliding is None else fields.get(first_sliding)
        if not is_integer(first):
            assert first_sliding is not None
            raise fields.refuse(first_sliding, "an integer")
        full, sliding = LAYER_TYPES
        return [sliding if layer >= first else full for layer in range(num_layers)]
    is_list = isinstance(types, (list, tuple)) and len(types) == num_layers
    if not is_list or any(kind not in LAYER_TYPES for kind in types):
        accepted = f"a list of {num_layers} of 'full_attention' and 'sliding_attention'"
        raise fields.refuse("layer_types", accepted)
    return list(types)


def quant_method(fields: Fields) -> str | None:
    """The format of quantised weights, as the config names it. None for floats.

    Raises ValueError for a format that the family cannot read.
    """
    readable = READ_QUANTISED.get(fields.get("model_type"))
    # compressed-tensors once wrote `compression_config`.
    for name in ("quantization_config", "compression_config"):
        found = fields.get(name)
        found = found.to_dict() if hasattr(found, "to_dict") else found
        if found in (None, {}, {"quant_method": None}):
            continue
        method = found.get("quant_method") if isinstance(found, dict) else found
        if readable is not None and method == readable:
            return readable
        if method != "none":
            others = "" if readable is None else f" and {readable}"
            raise ValueError(
                f"{fields.source}: {name}: quant_method is {method!r}; quantised checkpoints "
                f"other than GGUF{others} are not supported, give the model in float32, float16 or "
                "bfloat16"
            )
    return None


def check_shards(config: ModelConfig, size: int) -> None:
    """Raises ValueError for a number of ranks that cannot share the model evenly.

    The error lists the numbers that can.
    """

    sizes = {name: number for name, number in config.sharded_sizes().items() if number}

    def is_even(ranks: int) -> bool:
        kv_heads = config.num_kv_heads
        # With more ranks than KV heads, several ranks share one.
        kv_fits = kv_heads % ranks == 0 or ranks % kv_heads == 0
        heads_fit = config.num_heads % ranks == 0
        return heads_fit and kv_fits and all(number % ranks == 0 for number in sizes.values())

    if not is_even(size):
        shared = " and ".join(f"{name} {number}" for name, number in sizes.items())
        works = ", ".join(str(n) for n in range(1, config.num_heads + 1) if is_even(n))
        raise ValueError(
            f"tensor_parallel_size={size} does not divide the model's {config.num_heads} attention "
            f"heads, {config.num_kv_heads} key/value heads (or is a multiple of these) and "
            f"{shared} evenly; accepted are {works}"
        )


# The numbers of each rope type: (required, optional).
ROPE_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
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
    "longrope": (("original_max_position_embeddings",), ("factor", "attention_factor")),
}
# Other names of types. For text the three axes of Qwen-VL's mrope have equal positions.
ROPE_NAMES = {"mrope": "default", "su": "longrope"}


def rope_parameters(fields: Fields, partial: bool = False) -> RopeParameters:
    """`rope_parameters` of transformers 5, or the same from the fields of transformers 4.

    transformers 4 writes `rope_theta` and `rope_scaling`. partial: whether RoPE may turn
    only a part of each head.
    """
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    given = fields.get(name) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise fields.refuse(name, "one set of RoPE parameters for all layers")
    given = {key: value for key, value in given.items() if value is not None}
    if "rope_theta" not in given:
        given["rope_theta"] = fields.number("rope_theta", default=10000.0)
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        # Two fields that transformers 4 has beside `rope_scaling`.
        if partial and fields.get(key) is not None:
            given.setdefault(key, fields.get(key))
    return checked_rope(f"{fields.source}: {name}", given, partial)


def ropes_by_layer_type(fields: Fields, sliding_theta: str, default: float) -> Ropes:
    """RoPE of layers without a window, and of layers with one.

    transformers 5 has a set for each layer type. With transformers 4, layers with a
    window have no scaling, and the field `sliding_theta` is their base.
    """
    given = fields.get("rope_parameters")
    if not (isinstance(given, dict) and LAYER_TYPES[0] in given):
        theta = fields.number(sliding_theta, default=default)
        sliding = RopeParameters(rope_type="default", rope_theta=theta)
        return Ropes(rope_parameters(fields), sliding)
    sets = Fields(f"{fields.source}: rope_parameters", given.get)
    for kind in LAYER_TYPES:
        if not isinstance(sets.get(kind), dict):
            raise sets.refuse(kind, "a set of RoPE parameters")
    return Ropes(*(checked_rope(f"{sets.source}: {kind}", given[kind]) for kind in LAYER_TYPES))


def checked_rope(source: str, given: dict[str, object], partial: bool = False) -> RopeParameters:
    """One set of RoPE parameters. Raises ValueError that names `source` and the field."""
    # The key of the type was once "type".
    found = {key: value for key, value in given.items() if value is not None}
    found.setdefault("rope_type", found.get("type", "default"))
    kind = ROPE_NAMES.get(str(found["rope_type"]), found["rope_type"])
    if kind not in ROPE_NUMBERS:
        supported = ", ".join(ROPE_NUMBERS)
        raise ValueError(f"{source}: rope_type is {shown(kind)}; supported are {supported}")
    found["rope_type"] = kind
    inner = Fields(source, found.get)
    turned = inner.number("partial_rotary_factor", default=1.0)
    if turned > 1 or (turned != 1 and not partial):
        accepted = "a number above 0 up to 1.0" if partial else "1.0"
        raise inner.refuse("partial_rotary_factor", accepted)
    required, optional = ROPE_NUMBERS[kind]
    for key in ("rope_theta", *required, *(key for key in optional if key in found)):
        found[key] = inner.number(key, zero=key.startswith("mscale"))
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            check_numbers(inner, key)
    return cast(RopeParameters, found)


def check_numbers(fields: Fields, name: str) -> None:
    """Raises ValueError unless the field is a list of numbers above 0."""
    numbers = fields.get(name)
    if not isinstance(numbers, list) or not all(is_number(n) and n > 0 for n in numbers):
        raise fields.refuse(name, "a list of numbers above 0, one for each pair that RoPE turns")
