"""A matrix in the blocks of a GGUF file: 4-bit weights take 4 bits in memory.

A matrix may have several pieces of different types, because a file chooses the type of
each tensor, and layers fuse projections.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nanovllm.core.batch import ceil_div
from nanovllm.kernels import blocks
from nanovllm.loader.source import Blocks, BlockTensor, LazyTensor, Source
from nanovllm.weights.base import Weight
from nanovllm.weights.dense import matrix

logger = logging.getLogger("nanovllm")

ROWS_AT_ONCE = 1 << 10  # of a piece that is not stored in blocks; a multiple of a panel
FLOAT_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Piece:
    """Rows of the matrix that are stored in one type. offset: of its panels, in bytes."""

    type: str
    rows: range
    offset: int


class BlockWeight(Weight):
    """The layer's parameter `weight`: uint8 [bytes], the panels of all pieces.

    The parameter is empty until the types of the pieces are known. Products round the
    inputs to 16 bits (`kernels/blocks.cpp`).
    """

    def __init__(
        self, layer: nn.Module, out_features: int, in_features: int, num_groups: int = 1
    ) -> None:
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = torch.get_default_dtype()
        self.types: dict[range, str] = {}  # rows -> the type that they are stored in
        self.pieces: dict[range, Piece] = {}
        self.has_room = False  # whether `pieces` have the types of `types`
        self.segments = torch.empty(0, 4, dtype=torch.int64)
        self.dequantised: dict[range, str] = {}  # rows -> the type that the file has instead
        empty = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        layer.register_parameter("weight", empty)

    def sources(
        self,
        layer: nn.Module,
        name: str,
        shape: tuple[int, int],
        part: tuple[slice, slice],
        rows: slice,
    ) -> list[Source]:
        start, stop, _ = rows.indices(self.out_features)
        into = PieceReceiver(self, layer, range(start, stop))
        return [Source(f"{name}.weight", shape, part, into)]

    def begin_loading(self, layer: nn.Module) -> None:
        """Nothing to do: a piece is put into panels while it is read."""

    def finish_loading(self, layer: nn.Module) -> None:
        """Nothing to do: products read panels."""

    def allocate(self, layer: nn.Module) -> None:
        """Makes room for the pieces of `types`. Pieces that keep their type keep their weights."""
        if self.has_room:
            return
        self.has_room = True
        old, filled = self.pieces, matrix(layer)
        self.pieces = {}
        size = 0
        for rows in sorted(self.types, key=lambda rows: rows.start):
            piece = self.pieces[rows] = Piece(self.types[rows], rows, size)
            lines = ceil_div(self.packed_bytes(piece), blocks.CACHE_LINE)
            size += lines * blocks.CACHE_LINE
        layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
        for rows, piece in old.items():
            if self.types[rows] == piece.type:
                kept = filled[piece.offset :][: self.packed_bytes(piece)]
                self.memory(layer, rows).copy_(kept)
        table = [
            blocks.Segment(blocks.TYPES[piece.type], piece.offset, rows.start, len(rows))
            for rows, piece in self.pieces.items()
        ]
        self.segments = torch.tensor(table, dtype=torch.int64)

    def choose_type(self, rows: range, type: str) -> None:
        """Rows will be stored in this type."""
        if self.types.get(rows) != type:
            self.types[rows] = type
            self.has_room = False

    def packed_bytes(self, piece: Piece) -> int:
        return blocks.packed_bytes(blocks.TYPES[piece.type], len(piece.rows), self.in_features)

    def memory(self, layer: nn.Module, rows: range) -> Tensor:
        """The panels of a piece."""
        piece = self.pieces[rows]
        return matrix(layer).data[piece.offset :][: self.packed_bytes(piece)]

    def linear(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return blocks.linear(x, matrix(layer), self.segments, bias, self.out_features)

    def grouped(
        self,
        layer: nn.Module,
        x: Tensor,
        offsets: Tensor,
        num_groups: int,
        bias: Tensor | None,
    ) -> Tensor:
        weight = matrix(layer)
        return blocks.grouped(x, weight, self.segments, offsets, bias, self.out_features)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        return blocks.embedding(ids, matrix(layer), self.segments, self.in_features, self.dtype)


class PieceReceiver:
    """Reads rows of a matrix from one checkpoint tensor."""

    def __init__(self, weight: BlockWeight, layer: nn.Module, rows: range) -> None:
        self.weight = weight
        self.layer = layer
        self.rows = rows

    def expect(self, tensor: LazyTensor, part: tuple[slice, ...]) -> None:
        """A piece keeps the type of its blocks if there are kernels for the type."""
        weight = self.weight
        type = FLOAT_TYPES[weight.dtype]
        if isinstance(tensor, BlockTensor):
            if tensor.type in blocks.TYPES and tensor.in_blocks(part):
                type = tensor.type
            else:
                weight.dequantised[self.rows] = tensor.type
        weight.choose_type(self.rows, type)

    def allocate(self) -> None:
        self.weight.allocate(self.layer)

    def take(self, tensor: LazyTensor, part: tuple[slice, ...]) -> None:
        self.expect(tensor, part)
        self.allocate()
        weight = self.weight
        type = blocks.TYPES[weight.types[self.rows]]
        memory = weight.memory(self.layer, self.rows)
        stored = stored_blocks(tensor, part)
        if stored is not None and stored.type == weight.types[self.rows]:
            blocks.pack(type, stored.rows, stored.row_order, weight.in_features, memory)
            return
        start, stop, _ = part[0].indices(tensor.shape[0])
        for first in range(start, stop, ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, stop)
            piece = (slice(first, last), *part[1:])
            numbers = tensor[piece].to(weight.dtype).contiguous()
            rows = numbers.view(torch.uint8).numpy()
            done = blocks.packed_bytes(type, first - start, weight.in_features)
            blocks.pack(type, rows, np.arange(last - first), weight.in_features, memory[done:])


def stored_blocks(tensor: LazyTensor, part: tuple[slice, ...]) -> Blocks | None:
    """The part of a checkpoint tensor as it is stored, if it is stored in whole blocks."""
    return tensor.blocks(part) if isinstance(tensor, BlockTensor) else None


def report_dequantised(model: nn.Module) -> None:
    """Logs the types that are not kept as the file stores them, one line a type."""
    sizes: dict[str, int] = {}
    for module in model.modules():
        storage = getattr(module, "storage", None)
        if isinstance(storage, BlockWeight):
            for rows, type in storage.dequantised.items():
                size = storage.packed_bytes(storage.pieces[rows])
                sizes[type] = sizes.get(type, 0) + size
    for type, size in sizes.items():
        logger.warning(
            "weights of type %s are dequantised and take %.0f MB, because there are no kernels "
            "for their blocks, or a rank's share of a row is no whole number of blocks",
            type,
            size / 1e6,
        )
