"""Which file holds the model of an architecture. A new family is a file beside this one and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.models.decoder import CausalLM

MODELS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def model_class(architecture: str) -> type[CausalLM]:
    """The class of that name, a subclass of CausalLM."""
    module = import_module(f"nanovllm.models.{MODELS[architecture]}")
    return getattr(module, architecture)
