"""From the name of a model to its config, tokenizer and weights: a folder, a GGUF file, or a Hugging Face hub name.

Knows file formats; knows neither layers nor ranks. A rank that needs a slice of a tensor slices it, and only that is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from nanovllm.loader import safetensors
from nanovllm.loader.config_files import (
    checkpoint_dtype,
    generation_config_path,
    load_generation_config,
    load_hf_config,
)
from nanovllm.loader.hub import ModelFiles, resolve
from nanovllm.loader.tokenizer import load_tokenizer

__all__ = [
    "LazyTensor",
    "ModelFiles",
    "checkpoint_dtype",
    "generation_config_path",
    "head_differs",
    "iter_weights",
    "load_generation_config",
    "load_hf_config",
    "load_tokenizer",
    "resolve",
]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NO_PARAMETER = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")  # old checkpoints saved these tables


class LazyTensor(Protocol):
    """A tensor of a checkpoint. `w[a:b]`, `w[:, a:b]`, `w[...]` read that part and return it as a tensor of `dtype`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, index: Any) -> Tensor: ...


def iter_weights(files: ModelFiles) -> Iterator[tuple[str, LazyTensor]]:
    """(Hugging Face name, tensor) of every parameter in the checkpoint, none of them read yet."""
    for name, tensor in files.gguf if files.gguf is not None else safetensors.iter_tensors(files.folder):
        if not NO_PARAMETER.search(name):
            yield name, tensor
    if files.gguf is not None:
        files.gguf.close()


def head_differs(files: ModelFiles) -> bool:
    """Whether a checkpoint holds an output head that is not a copy of its embedding. Reads no more than these two."""
    found = {name: tensor for name, tensor in iter_weights(files) if name in (EMBEDDING, HEAD)}
    if len(found) < 2 or found[EMBEDDING].shape != found[HEAD].shape:
        return False
    rows = 4096
    parts = (slice(at, at + rows) for at in range(0, found[HEAD].shape[0], rows))
    return not all(torch.equal(found[EMBEDDING][part].float(), found[HEAD][part].float()) for part in parts)
