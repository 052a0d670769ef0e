"""Maps an architecture to the module of its model. A new family is a file and a line.

The module has a class of the architecture's name, a subclass of `decoder.CausalLM`. Other
architectures run as transformers' own code (`transformers_backend.py`).
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from nanovllm.loader.fields import Fields
from nanovllm.models.config import ModelConfig, quant_method

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nanovllm.models.base import LanguageModel

MODELS = {
    "Gemma2ForCausalLM": "nanovllm.models.gemma2",
    "Gemma3ForCausalLM": "nanovllm.models.gemma3",
    "Gemma3TextModel": "nanovllm.models.gemma3",
    "GptOssForCausalLM": "nanovllm.models.gpt_oss",
    "LlamaForCausalLM": "nanovllm.models.llama",
    "MistralForCausalLM": "nanovllm.models.mistral",
    "MixtralForCausalLM": "nanovllm.models.mixtral",
    "Olmo2ForCausalLM": "nanovllm.models.olmo2",
    "Olmo3ForCausalLM": "nanovllm.models.olmo2",
    "OlmoeForCausalLM": "nanovllm.models.olmoe",
    "Phi3ForCausalLM": "nanovllm.models.phi3",
    "Qwen2ForCausalLM": "nanovllm.models.qwen2",
    "Qwen2MoeForCausalLM": "nanovllm.models.qwen2_moe",
    "Qwen3ForCausalLM": "nanovllm.models.qwen3",
    "Qwen3MoeForCausalLM": "nanovllm.models.qwen3_moe",
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
    "gpt_oss": "GptOssForCausalLM",
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


# Runs any decoder of transformers. The name is vLLM's.
TRANSFORMERS = "TransformersForCausalLM"


def model_class(architecture: str) -> type[LanguageModel]:
    """The class of an architecture in MODELS, or TRANSFORMERS."""
    if architecture == TRANSFORMERS:
        return import_module("nanovllm.models.transformers_backend").TransformersForCausalLM
    return getattr(import_module(MODELS[architecture]), architecture)


def read_config(
    hf: PretrainedConfig | SimpleNamespace,
    source: str | Path = "config.json",
    model_impl: str = "auto",
    trust_remote_code: bool = False,
) -> ModelConfig:
    """A Hugging Face config, read by the model's own family.

    model_impl: "vllm" for our own models, "transformers" for transformers' own code, or
    "auto": the latter for an architecture that the former lack. Raises ValueError, naming
    `source` and the field, for what this engine does not run.
    """
    fields = Fields(source, lambda name: getattr(hf, name, None))
    quantization = quant_method(fields)
    foreign = None if model_impl == "vllm" else foreign_architecture(fields, model_impl)
    if foreign is None:
        return replace(read_own_config(fields), quantization=quantization)
    if isinstance(hf, SimpleNamespace):
        raise ValueError(
            f"model_impl={model_impl!r}: {source} is a GGUF file; accepted for it are 'auto' and "
            "'vllm'"
        )
    if quantization is not None:
        raise ValueError(
            f"model_impl={model_impl!r}: {source} has weights in {quantization}; accepted for it "
            "are 'auto' and 'vllm'"
        )
    # The import of transformers is slow, and our own models do not need it.
    from nanovllm.models.transformers_config import read_transformers_config

    config = read_transformers_config(hf, fields, foreign, trust_remote_code)
    return replace(config, architecture=TRANSFORMERS)


def read_own_config(fields: Fields) -> ModelConfig:
    """The config of one of our models, or of the text half of a multimodal model."""
    is_multimodal = not {*MULTIMODAL}.isdisjoint(listed_architectures(fields))
    if is_multimodal:
        fields = text_fields(fields)
    name = architecture(fields)
    family = import_module(MODELS[name])
    config: ModelConfig = getattr(family, name).read_config(fields)
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


def foreign_architecture(fields: Fields, model_impl: str) -> str | None:
    """The architecture to run as transformers' own code. None: one of ours runs."""
    listed = fields.get("architectures")
    names = [listed] if isinstance(listed, str) else listed
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not is_list or not names:
        if model_impl == "transformers":
            raise fields.refuse("architectures", "a list of one name such as 'LlamaForCausalLM'")
        return None
    if model_impl == "auto":
        is_ours = any(name in MODELS for name in names) or (
            names[0] in MULTIMODAL and text_fields(fields).get("model_type") in MODEL_TYPES
        )
        is_known = is_ours or not runs_in_transformers(fields, names[0])
        if is_known:
            return None
    return names[0]


def runs_in_transformers(fields: Fields, name: str) -> bool:
    """Whether transformers, or code beside the checkpoint, has a class of this name."""
    import transformers

    remote = fields.get("auto_map")
    is_remote = isinstance(remote, dict) and "AutoModelForCausalLM" in remote
    return is_remote or hasattr(transformers, name)


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
