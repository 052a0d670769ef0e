"""The forms that prompts and their parameters come in, brought to one: a list of (prompt, SamplingParams)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nanovllm.errors import ValidationError
from nanovllm.sampling_params import SamplingParams


def as_prompts(prompts: Any, prompt_token_ids: Any) -> list[Any]:
    """One prompt or many, and vLLM's former `prompt_token_ids=`, as a list of prompts."""
    texts = None if prompts is None else as_list(prompts)
    if prompt_token_ids is None:
        if texts is None:
            raise TypeError("prompts is missing: give a str, a list of token ids, a dict, or a list of these")
        return texts
    ids = as_list(prompt_token_ids)
    if texts is None:
        return ids
    if len(texts) != len(ids):
        raise ValidationError(f"prompts has {len(texts)} items and prompt_token_ids {len(ids)}; they must be as many")
    return [{"prompt": text, "prompt_token_ids": tokens} for text, tokens in zip(texts, ids)]


def as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a str, a list of token ids, a dict or a list of these; got {prompts!r}")
    prompts = list(prompts)
    # A flat list of ids is one prompt; numpy's integers are ids too.
    return [prompts] if prompts and hasattr(prompts[0], "__index__") else prompts


def pair(prompts: list[Any], params: Any, default: Callable[[], SamplingParams]) -> list[tuple[Any, SamplingParams]]:
    """Each prompt with its sampling parameters."""
    if params is None:
        params = default()
    if isinstance(params, SamplingParams):
        return [(prompt, params) for prompt in prompts]
    if not isinstance(params, Sequence):
        raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {type(params).__name__}")
    if len(params) != len(prompts):
        raise ValidationError(
            f"sampling_params has {len(params)} items for {len(prompts)} prompts; they must be as many"
        )
    return list(zip(prompts, params))
