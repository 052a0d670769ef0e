"""What a GGUF file of Gemma says beyond other files, as fields of config.json.

llama.cpp has some of these numbers in its code (src/models/gemma2.cpp, gemma3.cpp),
because old files lack them.
"""

from __future__ import annotations

from nanovllm.loader.fields import Fields, is_integer, shown

# Of the largest models the scores are divided by the root of hidden_size / heads, and of
# all others by the root of head_dim. Key: architecture. Value: its number of layers.
LARGEST = {"gemma2": 46, "gemma3": 62}
FULL_EVERY = {"gemma2": 2, "gemma3": 6}
PATTERN = "attention.sliding_window_pattern"
ROPE_OF_WINDOWS = 10000.0  # Gemma 3's base


def gemma_fields(
    family: str, fields: Fields, pattern: object, common: dict[str, object]
) -> dict[str, object]:
    """The fields of config.json that only Gemma has.

    fields: of the architecture. pattern: the field PATTERN, which may have a value a
    layer. common: the fields of config.json that all families have.
    """
    scalar = common["head_dim"]
    layers = fields.integer("block_count")
    if layers == LARGEST[family]:
        scalar = fields.integer("embedding_length") // fields.integer("attention.head_count")
    found: dict[str, object] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "layer_types": layer_types(family, fields, pattern, layers),
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
    }
    if family == "gemma2":
        found["sliding_window"] = fields.integer("attention.sliding_window", default=4096)
        found["attn_logit_softcapping"] = fields.number("attn_logit_softcapping", default=50.0)
        found["final_logit_softcapping"] = fields.number("final_logit_softcapping", default=30.0)
        return found
    theta = fields.number("rope.freq_base_swa", default=ROPE_OF_WINDOWS)
    return found | {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": common["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }


def layer_types(family: str, fields: Fields, pattern: object, layers: int) -> list[str]:
    """One a layer. A Gemma 3 without a window in its file has none."""
    if pattern is None:
        pattern = FULL_EVERY[family]
    if family == "gemma3" and not fields.get("attention.sliding_window"):
        has_window = [False] * layers
    elif isinstance(pattern, list) and len(pattern) == layers:
        has_window = [bool(each) for each in pattern]
    elif is_integer(pattern) and pattern > 0:
        has_window = [layer % pattern != 0 for layer in range(1, layers + 1)]
    else:
        raise ValueError(
            f"{fields.source}: {PATTERN} is {shown(pattern)}; accepted is an integer of at least 1 "
            f"or a list of {layers} of true and false"
        )
    return ["sliding_attention" if each else "full_attention" for each in has_window]
