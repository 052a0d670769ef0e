"""Tiny models made by transformers, which is also the oracle: random weights, large enough that tokens differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 298,
    "eos_token_id": 299,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 32},
    "Qwen2": {},
    "Llama": {},
    "Mistral": {"head_dim": 16, "sliding_window": None},
}


def tiny_model(folder: Path, family: str, **overrides: Any) -> tuple[str, Any]:
    """Saves a random model of the family (float32) and returns (its folder, the transformers model)."""
    config_class = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(len(family) + len(str(sorted(overrides.items()))))
    model = model_class(config_class(**{**SIZES, **FAMILIES[family], **overrides})).float().eval()
    for name, parameter in model.named_parameters():  # biases and norms begin as 0 and 1, which hides mistakes
        if parameter.dim() == 1:
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return str(folder), model


@torch.no_grad()
def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The next `num_tokens` of transformers' greedy decoding, EOS or not."""
    ids = torch.tensor([prompt])
    # Without a mask, a token in the prompt that equals the padding id is masked out.
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def next_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocabulary] float32: transformers' logits after each token."""
    return model(torch.tensor([tokens])).logits[0].float()


def random_prompts(lengths: list[int], vocab_size: int = 298, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
