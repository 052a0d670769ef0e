"""From the name of a model to its config, tokenizer and weights. A name is a folder, a
GGUF file or a Hugging Face hub name.

Knows file formats. Does not know layers or ranks: a rank slices a tensor, and only the
slice is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from nanovllm.loader import safetensors
from nanovllm.loader.config_files import (
    checkpoint_dtype,
    generation_config_path,
    load_generation_config,
    load_hf_config,
    pretrained,
    text_config,
)
from nanovllm.loader.hub import ModelFiles, resolve
from nanovllm.loader.source import EMBEDDING, HEAD, LazyTensor
from nanovllm.loader.text_half import text_name
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
    "pretrained",
    "resolve",
    "text_config",
]

# Old checkpoints saved these tables of RoPE. They are no parameters.
NO_PARAMETER = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
COMPARE_AT_ONCE = 4096  # rows


def iter_weights(files: ModelFiles) -> Iterator[tuple[str, LazyTensor]]:
    """(Hugging Face name, tensor) of every parameter in the checkpoint.

    No tensor is read yet.
    """
    tensors = safetensors.iter_tensors(files.folder) if files.gguf is None else files.gguf
    for name, tensor in tensors:
        if not NO_PARAMETER.search(name):
            yield name, tensor
    if files.gguf is not None:
        files.gguf.close()


def head_differs(files: ModelFiles) -> bool:
    """Whether the checkpoint has an output head that is not a copy of its embedding.

    Reads only these two tensors.
    """
    if files.gguf is not None:
        return files.gguf.head_differs()
    named = ((text_name(name), tensor) for name, tensor in iter_weights(files))
    found = {name: tensor for name, tensor in named if name in (EMBEDDING, HEAD)}
    if len(found) < 2 or found[EMBEDDING].shape != found[HEAD].shape:
        return False
    embedding = found[EMBEDDING]
    head = found[HEAD]
    for start in range(0, head.shape[0], COMPARE_AT_ONCE):
        rows = slice(start, start + COMPARE_AT_ONCE)
        if not torch.equal(embedding[rows].float(), head[rows].float()):
            return True
    return False
