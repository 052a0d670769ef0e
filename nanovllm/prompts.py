"""The forms that prompts and their parameters come in, brought to one: a list of (prompt, SamplingParams)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from nanovllm.errors import ValidationError
from nanovllm.sampling_params import SamplingParams

# Their items are integers, but nobody means them as token ids.
_BYTES = (bytes, bytearray, memoryview)


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
    """One prompt or many as a list of prompts. Raises TypeError for what is neither."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (*_BYTES, AbstractSet)) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a str, a list of token ids, a dict or a list of these; got {prompts!r}")
    num_dims = array_dims(prompts)
    if num_dims == 0:
        return [prompts]  # a number is no prompt; the engine says so
    items = list(prompts)
    if num_dims == 1:
        return [prompts] if items else []  # one row of numbers is one prompt; of a matrix each row is one
    # A flat list of ids is one prompt; numpy's integers and torch's scalars are ids too. Arrays have __index__ as well.
    is_flat = bool(items) and hasattr(items[0], "__index__") and getattr(items[0], "ndim", 0) == 0
    return [items] if is_flat else items


def array_dims(value: Any) -> int | None:
    """The dimensions of an array or tensor of numbers; None for all else, also arrays of str or of objects."""
    if not (hasattr(value, "ndim") and hasattr(value, "dtype")):
        return None
    return value.ndim if getattr(value.dtype, "kind", "i") not in "OUST" else None


def as_token_ids(token_ids: Any) -> np.ndarray:
    """One prompt's token ids, of any integer type: [num_tokens]. Raises TypeError for anything else."""
    tokens = token_ids
    if hasattr(token_ids, "tolist") and not isinstance(token_ids, (np.ndarray, memoryview)):
        tokens = token_ids.tolist()  # torch's tensors, on any device
    try:
        tokens = np.asarray(tokens)
    except ValueError:
        tokens = np.empty(0, object)
    is_flat = tokens.ndim == 1 and (len(tokens) == 0 or tokens.dtype.kind in "iu")
    if tokens.dtype == object or not is_flat or isinstance(token_ids, _BYTES):
        kind = getattr(token_ids, "dtype", type(token_ids).__name__)
        raise TypeError(f"prompt: token ids must be a flat list of int, got {str(token_ids)[:80]} ({kind})")
    return tokens


def asks(value: Any) -> bool:
    """Whether an optional part of a prompt asks for something; None, False and empty values do not."""
    try:
        return bool(value)
    except (ValueError, RuntimeError):  # an array of several numbers is neither true nor false
        return True


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
