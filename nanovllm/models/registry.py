"""Which file holds the model of an architecture. A new family is a file beside this one and a line here."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

MODELS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def family(architecture: str) -> ModuleType:
    """The file with the class of that name, a subclass of CausalLM."""
    return import_module(f"nanovllm.models.{MODELS[architecture]}")
