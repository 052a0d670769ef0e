"""Maps an architecture to the module of its model. A new family is a file and a line.

The module has a class of the architecture's name, a subclass of `decoder.CausalLM`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.loader.fields import Fields
from nanovllm.models.config import ModelConfig, refuse_quantised

if TYPE_CHECKING:
    from nanovllm.models.decoder import CausalLM

MODELS = {
    "LlamaForCausalLM": "nanovllm.models.llama",
    "MistralForCausalLM": "nanovllm.models.mistral",
    "MixtralForCausalLM": "nanovllm.models.mixtral",
    "Qwen2ForCausalLM": "nanovllm.models.qwen2",
    "Qwen2MoeForCausalLM": "nanovllm.models.qwen2_moe",
    "Qwen3ForCausalLM": "nanovllm.models.qwen3",
    "Qwen3MoeForCausalLM": "nanovllm.models.qwen3_moe",
    "Gemma2ForCausalLM": "nanovllm.models.gemma2",
    "Gemma3ForCausalLM": "nanovllm.models.gemma3",
    "Gemma3TextModel": "nanovllm.models.gemma3",
    "Olmo2ForCausalLM": "nanovllm.models.olmo2",
    "Olmo3ForCausalLM": "nanovllm.models.olmo2",
    "OlmoeForCausalLM": "nanovllm.models.olmoe",
    "Phi3ForCausalLM": "nanovllm.models.phi3",
}
# Architectures that read images too. They compute a text as the family of their
# `text_config` does.
MULTIMODAL = (
    "Gemma3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)
# For a config without architectures. transformers 5 calls a Mistral with layer_types
# "ministral".
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    # Text alone has equal positions on the three axes of Qwen-VL's RoPE. transformers has
    # no text_config in them until 4.52.
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), "Qwen2ForCausalLM"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), "Qwen2ForCausalLM"),
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


def model_class(architecture: str) -> type[CausalLM]:
    """The class of an architecture in MODELS."""
    return getattr(import_module(MODELS[architecture]), architecture)


def read_config(hf: object, source: str | Path = "config.json") -> ModelConfig:
    """A Hugging Face config, read by the model's own family.

    Raises ValueError, naming `source` and the field, for what this engine does not run.
    """
    fields = Fields(source, lambda name: getattr(hf, name, None))
    refuse_quantised(fields)
    is_multimodal = not {*MULTIMODAL}.isdisjoint(listed_architectures(fields))
    if is_multimodal:
        fields = text_fields(fields)
    name = architecture(fields)
    config = model_class(name).read_config(fields)
    return replace(config, architecture=name, is_multimodal=is_multimodal)


def text_fields(fields: Fields) -> Fields:
    """The fields of `text_config`, or the same fields if there is no `text_config`.

    Its `architectures` says nothing: some files repeat the multimodal name there.
    """
    text = fields.get("text_config")

    def get(name: str) -> object:
        if name == "architectures":
            return None
        value = fields.get(name) if text is None else getattr(text, name, None)
        # transformers 5 ties weights by the field outside.
        return value or fields.get(name) if name == "tie_word_embeddings" else value

    return Fields(fields.source if text is None else f"{fields.source}: text_config", get)


def architecture(fields: Fields) -> str:
    """The first supported name of `architectures`, or else the architecture of the model_type."""
    names = listed_architectures(fields)
    if not names:
        model_type = fields.get("model_type")
        if model_type not in MODEL_TYPES:
            accepted = f"one of {', '.join(MODEL_TYPES)}, as architectures is missing"
            raise fields.refuse("model_type", accepted)
        return MODEL_TYPES[model_type]
    known = [name for name in names if name in MODELS]
    if not known:
        raise ValueError(
            f"{fields.source}: architectures: {', '.join(map(repr, names))} is not supported; "
            f"supported are {', '.join((*MODELS, *MULTIMODAL))}"
        )
    return known[0]


def listed_architectures(fields: Fields) -> list[str]:
    """The names in `architectures`. [] if the field is missing."""
    listed = fields.get("architectures")
    names = [listed] if isinstance(listed, str) else listed or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise fields.refuse("architectures", "a list of names such as 'LlamaForCausalLM'")
    return list(names)
