"""How checkpoint tensors find their parameters: every layer lists which part of which tensor fills which part of it.

So fused and sharded parameters are filled slice by slice, and a rank reads no more than its shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

COPY_AT_ONCE = 1 << 22  # numbers
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # others are codes of quantised weights

# Part of a tensor's name -> the fields of config.json that give its shape, and those that say that it is there.
SIZE_FIELDS = {
    "embed_tokens": "vocab_size, hidden_size",
    "lm_head": "vocab_size, hidden_size",
    "q_proj": "num_attention_heads, head_dim, hidden_size",
    "k_proj": "num_key_value_heads, head_dim, hidden_size",
    "v_proj": "num_key_value_heads, head_dim, hidden_size",
    "o_proj": "num_attention_heads, head_dim, hidden_size",
    "q_norm": "head_dim",
    "k_norm": "head_dim",
    "mlp": "intermediate_size, hidden_size",
    "norm": "hidden_size",
}
PRESENCE_FIELDS = {
    "lm_head": "tie_word_embeddings",
    "mlp": "num_hidden_layers, mlp_bias",
    "q_norm": "num_hidden_layers, architectures",
    "k_norm": "num_hidden_layers, architectures",
    "self_attn": "num_hidden_layers, attention_bias",
    "layers.": "num_hidden_layers",
}


class Source(NamedTuple):
    """`into` is filled by the slices `part` of the checkpoint tensor `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    part: tuple[slice, ...]
    into: Tensor


def fill(model: nn.Module, weights: Iterable[tuple[str, Any]]) -> set[str]:
    """Fills parameters in place from (name, tensor or lazy tensor) pairs; returns the names of those given.

    A tied model takes its one matrix from the embedding, or from the output head where the embedding is not given.
    Raises ValueError for a tensor that the model does not know, whose shape is another, or that holds no floats.
    """
    wanted = all_sources(model)
    given, unknown = set(), []
    tied_head: Any = None
    for name, tensor in weights:
        if name in wanted:
            fill_from(name, tensor, wanted[name])
            given.add(name)
        elif name == HEAD and EMBEDDING in wanted:
            tied_head = tensor
        else:
            unknown.append(name)
    if tied_head is not None and EMBEDDING not in given:
        fill_from(HEAD, tied_head, wanted[EMBEDDING])
        given.add(EMBEDDING)
    if unknown:
        fields = config_fields(unknown, PRESENCE_FIELDS)
        raise ValueError(f"checkpoint: the model has no parameter for {listing(unknown)}{fields}")
    return given


def fill_from(name: str, tensor: Any, sources: list[Source]) -> None:
    """Copies one checkpoint tensor into all that it fills. Raises ValueError for another shape, or no floats."""
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"checkpoint: tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}; accepted are float32, "
            "float16 and bfloat16, because quantised checkpoints other than GGUF are not supported"
        )
    for source in sources:
        if tuple(tensor.shape) != source.shape:
            raise ValueError(
                f"checkpoint: tensor {name} has shape {list(tensor.shape)}, the config asks for {list(source.shape)}"
                f"{config_fields([name], SIZE_FIELDS)}"
            )
        copy_part(source.into.data, tensor, source.part)


def config_fields(names: Iterable[str], table: dict[str, str]) -> str:
    """The fields of config.json behind these tensors, as the end of an error; "" where none is known."""
    found = [next((fields for part, fields in table.items() if part in name), "") for name in names]
    unique = dict.fromkeys(field for fields in found if fields for field in fields.split(", "))
    return f" (config.json: {', '.join(unique)})" if unique else ""


def copy_part(into: Tensor, tensor: Any, part: tuple[slice, ...]) -> None:
    """into.copy_(tensor[part]) by some rows at a time: the embedding of a large vocabulary is not there twice."""
    start, stop, _ = part[0].indices(tensor.shape[0])
    rows = max(1, COPY_AT_ONCE // max(1, math.prod(tensor.shape[1:])))
    for a in range(start, stop, rows):
        b = min(a + rows, stop)
        piece = (slice(a, b), *part[1:])
        into[a - start : b - start].copy_(tensor[piece])


def all_sources(model: nn.Module) -> dict[str, list[Source]]:
    """Checkpoint name -> what it fills."""
    found: dict[str, list[Source]] = {}
    for prefix, module in model.named_modules():
        for source in module.sources(prefix) if hasattr(module, "sources") else ():
            found.setdefault(source.name, []).append(source)
    return found


def listing(names: Iterable[str], most: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
