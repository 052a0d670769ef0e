"""A step as the device sees it: packed arrays, no Sequence. Numpy on the host, torch on
the device.

An optional ability of a request travels as a `Part` of its own. A batch has the part only
if some request of the batch uses the ability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Generic, Protocol, TypeVar, cast

import numpy as np

from nanovllm.core.step import Array

Other = TypeVar("Other")
Number = TypeVar("Number", int, np.ndarray)
Value = TypeVar("Value")


class HostOnly(Generic[Value]):
    """A Python object in a part. It stays in the engine's process: other ranks read None."""

    def __init__(self, value: Value | None) -> None:
        self.value = value

    def __reduce__(self) -> tuple[object, ...]:
        return HostOnly, (None,)


@dataclass
class Part(Generic[Array]):
    """Arrays of int32 or float32, plain ints and `HostOnly` objects.

    A subclass is a dataclass that names them.
    """

    def map(self, function: Callable[[Array], Other]) -> Part[Other]:
        """The same part, of the same class, with `function(array)` in the place of each array."""
        kept = (int, HostOnly)
        values = (v if type(v) in kept else function(v) for v in vars(self).values())
        return type(self)(*values)  # type: ignore[return-value]


@dataclass
class Tokens(Part[Array]):
    """The T tokens that a step computes, one sequence after the other."""

    ids: Array  # [T] int32; -1: the device has sampled the token, and the host has not seen it yet
    rows: Array  # [T] int32 rows of the sequence table


@dataclass
class AttentionMetadata(Part[Array]):
    """What attention needs to know of a step: T tokens of S sequences, all arrays int32.

    Tokens `query_start[i]:query_start[i + 1]` belong to sequence i, in order of position.
    They end at position `context_lens[i] - 1`. Rows of `block_tables` are padded with
    valid block ids.
    """

    positions: Array  # [T]
    slot_mapping: Array  # [T] block * block_size + offset of the token's K/V; -1 writes nowhere
    query_start: Array  # [S + 1]
    context_lens: Array  # [S] tokens of K/V to attend to, this step's tokens included
    block_tables: Array  # [S, max_blocks]
    max_query_len: int
    num_prefills: int  # sequences of more than one token
    max_context_len: int


@dataclass
class SampleRows(Part[Array]):
    """The K tokens whose successors are sampled."""

    at: Array  # [K] int32 indices into the step's tokens
    rows: Array  # [K] int32 rows of the sequence table
    temperature: Array  # [K] float32, 0: greedy; [0] where all are greedy
    uniform: Array  # [K] float32 random numbers in [0, 1); [0] where all are greedy


@dataclass
class Batch(Generic[Array]):
    """One step. `parts` holds the optional abilities that some request uses, by their names."""

    tokens: Tokens[Array]
    attention: AttentionMetadata[Array]
    sample: SampleRows[Array]
    parts: dict[str, Part[Array]] = field(default_factory=dict)

    def map(self, function: Callable[[Array], Other]) -> Batch[Other]:
        """The same batch with `function(array)` in the place of each array."""
        return Batch(
            tokens=self.tokens.map(function),  # type: ignore[arg-type]
            attention=self.attention.map(function),  # type: ignore[arg-type]
            sample=self.sample.map(function),  # type: ignore[arg-type]
            parts={name: part.map(function) for name, part in self.parts.items()},
        )


@dataclass(slots=True)
class Place:
    """Where an array lies in a packed batch."""

    start: int  # in items of 4 bytes
    shape: tuple[int, ...]
    is_float: bool


def padded_length(length: int) -> int:
    """Arrays begin at multiples of 16 bytes: Triton compiles a kernel once more for any other."""
    return ceil_div(length, 4) * 4


def ceil_div(a: Number, b: int) -> Number:
    return (a + b - 1) // b


def pack(batch: Batch[np.ndarray]) -> tuple[np.ndarray, Batch[Place]]:
    """All arrays in one int32 buffer: one copy to a GPU, one message to other ranks."""
    arrays: list[np.ndarray] = []
    size = 0

    def place(array: np.ndarray) -> Place:
        nonlocal size
        found = Place(size, array.shape, array.dtype == np.float32)
        size += padded_length(array.size)
        arrays.append(array)
        return found

    layout = batch.map(place)
    buffer = np.empty(size, np.int32)
    at = 0
    for array in arrays:
        buffer[at : at + array.size] = array.reshape(-1).view(np.int32)
        at += padded_length(array.size)
    return buffer, layout


class Buffer(Protocol):
    """What numpy's arrays and torch's tensors have in common here."""

    def __getitem__(self, index: object) -> Buffer: ...
    def __setitem__(self, index: object, value: object) -> None: ...
    def __iter__(self) -> Iterator[Buffer]: ...
    def __iadd__(self, other: object) -> Buffer: ...
    def view(self, dtype: object) -> Buffer: ...
    def reshape(self, *shape: int) -> Buffer: ...


def unpack(layout: Batch[Place], buffer: Array, float32: object) -> Batch[Array]:
    """Views into a packed buffer of numpy or torch. `float32` is that library's dtype."""
    whole = cast(Buffer, buffer)

    def view(place: Place) -> Array:
        piece = whole[place.start : place.start + prod(place.shape)]
        if place.is_float:
            piece = piece.view(float32)
        return cast(Array, piece.reshape(*place.shape))

    return layout.map(view)
