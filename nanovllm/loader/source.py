"""Fills parameters from checkpoint tensors. Each layer lists its sources: which part of
which checkpoint tensor fills which part of which parameter.

Fused and sharded parameters are filled slice by slice, and a rank reads only its own
shard. Does not know file formats: a checkpoint tensor is anything that can be sliced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import EllipsisType
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from nanovllm.loader.text_half import text_name

COPY_AT_ONCE = 1 << 22  # numbers
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Checkpoints store weights in these types. Other types hold codes of quantised weights.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Errors name the fields of config.json behind a tensor. Key: a part of the tensor's name.
SIZE_FIELDS = {  # the fields that give the shape of the tensor
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
PRESENCE_FIELDS = {  # the fields that say whether the tensor exists
    "lm_head": "tie_word_embeddings",
    "mlp": "num_hidden_layers, mlp_bias",
    "q_norm": "num_hidden_layers, architectures",
    "k_norm": "num_hidden_layers, architectures",
    "self_attn": "num_hidden_layers, attention_bias",
    "layers.": "num_hidden_layers",
}

Part = slice | EllipsisType | tuple[slice, ...]


def rows_and_columns(part: Part) -> tuple[slice, slice]:
    """The slices of a matrix that `part` stands for. A dimension without a slice is whole."""
    whole = slice(None)
    if isinstance(part, slice):
        return part, whole
    if isinstance(part, tuple):
        rows, columns = (*part, whole)[:2]
        return rows, columns
    return whole, whole


class LazyTensor(Protocol):
    """A tensor of a checkpoint, not read yet.

    `w[a:b]`, `w[:, a:b]` and `w[...]` read that part, as a tensor of `dtype`.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, part: Part, /) -> Tensor: ...


class Blocks(NamedTuple):
    """Rows of a matrix as a quantised checkpoint stores them.

    type: a name of a GGUF type, such as "Q4_K". rows: uint8 [rows of the file, bytes].
    row_order: int64 [rows of the matrix], the row of the file for each row of the matrix.
    """

    type: str
    rows: np.ndarray
    row_order: np.ndarray


@runtime_checkable
class BlockTensor(Protocol):
    """A LazyTensor that can be read as it is stored."""

    @property
    def type(self) -> str: ...

    def in_blocks(self, part: tuple[slice, ...]) -> bool:
        """Whether the slice of columns begins and ends with blocks. Reads nothing."""

    def blocks(self, part: tuple[slice, ...]) -> Blocks | None:
        """The slices of rows and columns. None if the columns do not begin and end with blocks."""


@runtime_checkable
class Receiver(Protocol):
    """A part of a parameter whose form depends on how the checkpoint stores it."""

    def expect(self, tensor: LazyTensor, part: tuple[slice, ...]) -> None:
        """Notes how the tensor is stored. No memory is allocated yet."""

    def allocate(self) -> None:
        """Allocates the memory of the whole parameter."""

    def take(self, tensor: LazyTensor, part: tuple[slice, ...]) -> None:
        """Reads the slices `part` of the tensor."""


class Source(NamedTuple):
    """The slices `part` of the checkpoint tensor `name` fill `into`.

    shape: the shape of the whole checkpoint tensor.
    """

    name: str
    shape: tuple[int, ...]
    part: tuple[slice, ...]
    into: Tensor | Receiver


def fill(model: nn.Module, weights: Iterable[tuple[str, LazyTensor]]) -> set[str]:
    """Fills parameters in place from (name, tensor) pairs. Returns the used names.

    A name in the text half of a multimodal checkpoint counts as the name in a text model.
    A tied model reads its one matrix from the embedding, or from the output head if the
    embedding is not given. Raises ValueError for a tensor that the model does not know,
    that has another shape, or that has no floating-point dtype.
    """
    wanted = all_sources(model)
    given: set[str] = set()
    unknown: list[str] = []
    tied_head: LazyTensor | None = None
    for given_name, tensor in weights:
        name = given_name if given_name in wanted else text_name(given_name)
        if name in wanted:
            fill_from(name, tensor, wanted[name])
            given.add(name)
        elif name == HEAD and EMBEDDING in wanted:
            tied_head = tensor
        else:
            unknown.append(given_name)
    if tied_head is not None and EMBEDDING not in given:
        fill_from(HEAD, tied_head, wanted[EMBEDDING])
        given.add(EMBEDDING)
    if unknown:
        fields = config_fields(unknown, PRESENCE_FIELDS)
        raise ValueError(f"checkpoint: the model has no parameter for {listing(unknown)}{fields}")
    return given


def fill_from(name: str, tensor: LazyTensor, sources: list[Source]) -> None:
    """Copies one checkpoint tensor into everything that it fills.

    Raises ValueError for another shape, or for a dtype that is not floating-point.
    """
    if tensor.dtype not in FLOATS:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"checkpoint: tensor {name} is stored as {dtype}; accepted are float32, float16 and "
            "bfloat16, because quantised checkpoints other than GGUF are not supported"
        )
    for source in sources:
        if tuple(tensor.shape) != source.shape:
            raise ValueError(
                f"checkpoint: tensor {name} has shape {list(tensor.shape)}, the config asks for "
                f"{list(source.shape)}{config_fields([name], SIZE_FIELDS)}"
            )
        if isinstance(source.into, Tensor):
            copy_part(source.into.data, tensor, source.part)
        else:
            source.into.take(tensor, source.part)


def expect(model: nn.Module, weights: Iterable[tuple[str, LazyTensor]]) -> None:
    """Allocates the parameters whose form depends on the tensors that `fill` will read."""
    wanted = all_sources(model)
    known = {name if name in wanted else text_name(name): tensor for name, tensor in weights}
    if EMBEDDING not in known and HEAD in known:
        known[EMBEDDING] = known[HEAD]  # of a tied model
    receivers: list[Receiver] = []
    for name, tensor in known.items():
        for source in wanted.get(name, ()):
            if isinstance(source.into, Receiver) and tuple(tensor.shape) == source.shape:
                source.into.expect(tensor, source.part)
                receivers.append(source.into)
    for receiver in receivers:
        receiver.allocate()


def config_fields(names: Iterable[str], table: dict[str, str]) -> str:
    """The fields of config.json behind these tensors, as the end of an error.

    "" if the table has no field for them.
    """
    found: dict[str, None] = {}  # a set in order of insertion
    for name in names:
        fields = next((fields for part, fields in table.items() if part in name), None)
        if fields is not None:
            found.update(dict.fromkeys(fields.split(", ")))
    return f" (config.json: {', '.join(found)})" if found else ""


def copy_part(into: Tensor, tensor: LazyTensor, part: tuple[slice, ...]) -> None:
    """into.copy_(tensor[part]), a few rows at a time.

    The memory then never holds a second copy of a large matrix, such as the embedding.
    """
    start, stop, _ = part[0].indices(tensor.shape[0])
    rows = max(1, COPY_AT_ONCE // max(1, math.prod(tensor.shape[1:])))
    for a in range(start, stop, rows):
        b = min(a + rows, stop)
        piece = (slice(a, b), *part[1:])
        into[a - start : b - start].copy_(tensor[piece])


def all_sources(model: nn.Module) -> dict[str, list[Source]]:
    """Checkpoint name -> the sources that read this tensor."""
    found: dict[str, list[Source]] = {}
    for prefix, module in model.named_modules():
        for source in module.sources(prefix) if hasattr(module, "sources") else ():
            found.setdefault(source.name, []).append(source)
    return found


def listing(names: Iterable[str], most: int = 5) -> str:
    """The first `most` names in alphabetical order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
