"""Matrices in MXFP4 as checkpoints on the hub store them (OCP Microscaling Formats, 2023).

A block is 32 neighbours of a row. It has 4-bit floats (E2M1: a sign, two bits of exponent,
one of mantissa) and one scale, a power of two. A checkpoint has two tensors for a matrix:
bytes of two neighbours each, and the exponents of the scales.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanovllm.core.batch import ceil_div
from nanovllm.loader.source import Blocks, LazyTensor, Part, rows_and_columns

BLOCK = 32  # weights
BLOCK_BYTES = BLOCK // 2
ONE = 127  # the exponent of the scale 1
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = torch.tensor([*POSITIVE, *(-number for number in POSITIVE)])  # in the order of codes
# Two numbers for each byte. The low half is the first.
PAIRS = torch.stack((NUMBERS.repeat(16), NUMBERS.repeat_interleave(16)), dim=-1)


class Mxfp4Matrix:
    """Every `step`-th row, from row `first` on, of one expert's matrix: a BlockTensor.

    codes: uint8 [experts, rows, blocks of a row, 16]. scales: uint8 [experts, rows,
    blocks of a row]. Slicing dequantises the slice.
    """

    type = "MXFP4"
    dtype = torch.float32

    def __init__(
        self, codes: LazyTensor, scales: LazyTensor, expert: int, first: int, step: int
    ) -> None:
        self.codes = codes
        self.scales = scales
        self.expert = slice(expert, expert + 1)
        self.first = first
        self.step = step
        self.shape = (codes.shape[1] // step, codes.shape[2] * BLOCK)

    def __getitem__(self, part: Part, /) -> Tensor:
        """part: at most one slice for each dimension, or `...` for the whole matrix."""
        rows, columns = rows_and_columns(part)
        start, stop, _ = columns.indices(self.shape[1])
        first, last = start // BLOCK, ceil_div(stop, BLOCK)
        codes, scales = self.read(rows, slice(first, last))
        numbers = PAIRS[codes.long()].flatten(2)  # [rows, blocks, 32]
        numbers = torch.ldexp(numbers, scales[..., None].int() - ONE)
        offset = first * BLOCK
        return numbers.flatten(1)[:, start - offset : stop - offset]

    def read(self, rows: slice, blocks: slice) -> tuple[Tensor, Tensor]:
        """(codes [rows, blocks, 16], scales [rows, blocks]), both uint8."""
        start, stop, _ = rows.indices(self.shape[0])
        stored = slice(start * self.step, stop * self.step)
        codes = self.codes[self.expert, stored, blocks][0]
        scales = self.scales[self.expert, stored, blocks][0]
        chosen = slice(self.first, None, self.step)
        return codes[chosen], scales[chosen]

    def in_blocks(self, part: tuple[slice, ...]) -> bool:
        """Whether the columns begin and end with blocks."""
        start, stop, _ = part[1].indices(self.shape[1])
        return start % BLOCK == 0 and stop % BLOCK == 0

    def blocks(self, part: tuple[slice, ...]) -> Blocks | None:
        """The slices of rows and columns as a GGUF file stores them.

        None if the columns do not begin and end with blocks.
        """
        if not self.in_blocks(part):
            return None
        rows, columns = part
        start, stop, _ = columns.indices(self.shape[1])
        codes, scales = self.read(rows, slice(start // BLOCK, stop // BLOCK))
        packed = gguf_blocks(codes.numpy(), scales.numpy())
        return Blocks(self.type, packed, np.arange(len(packed)))


def gguf_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """codes uint8 [rows, blocks, 16], scales uint8 [rows, blocks] -> uint8 [rows, bytes].

    A block of a GGUF file is the scale and then 16 bytes. Byte i has the codes of the
    weights i (low half) and i + 16.
    """
    halves = np.ascontiguousarray(codes).view(np.uint64)  # [rows, blocks, 2]: 16 codes each
    low, high = halves[..., 0], halves[..., 1]
    low_codes, high_codes = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0)
    four = np.uint64(4)
    even = (low & low_codes) | ((high & low_codes) << four)  # of even weights
    odd = ((low >> four) & low_codes) | (high & high_codes)
    packed = np.empty((*scales.shape, 1 + BLOCK_BYTES), np.uint8)
    packed[..., 0] = scales
    packed[..., 1::2] = even[..., None].view(np.uint8)
    packed[..., 2::2] = odd[..., None].view(np.uint8)
    return packed.reshape(len(scales), -1)
