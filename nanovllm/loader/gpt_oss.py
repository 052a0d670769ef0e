"""The experts of gpt-oss checkpoints, shown as one matrix an expert.

A checkpoint has one tensor for all experts of a layer. Rows of gate and up alternate, gate
first. Matrices are in MXFP4, or numbers: then they are transposed, [experts, inputs,
outputs].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from nanovllm.loader.mxfp4 import Mxfp4Matrix
from nanovllm.loader.source import LazyTensor, Part, rows_and_columns

STACKED = re.compile(r"(?P<experts>.+\.experts)\.(?P<name>gate_up_proj|down_proj)(?P<kind>|_\w+)")
PIECES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class TransposedMatrix:
    """Every `step`-th output, from `first` on, of one expert of [experts, inputs, outputs].

    It is a LazyTensor [outputs, inputs].
    """

    def __init__(self, tensor: LazyTensor, expert: int, first: int, step: int) -> None:
        self.tensor = tensor
        self.expert = slice(expert, expert + 1)
        self.first = first
        self.step = step
        self.dtype: torch.dtype = tensor.dtype
        self.shape = (tensor.shape[2] // step, tensor.shape[1])

    def __getitem__(self, part: Part, /) -> Tensor:
        rows, columns = rows_and_columns(part)
        start, stop, _ = rows.indices(self.shape[0])
        outputs = slice(start * self.step, stop * self.step)
        numbers = self.tensor[self.expert, columns, outputs][0]
        return numbers[:, self.first :: self.step].T


class ExpertBias:
    """Every `step`-th number, from `first` on, of one expert of [experts, outputs]."""

    def __init__(self, tensor: LazyTensor, expert: int, first: int, step: int) -> None:
        self.tensor = tensor
        self.expert = slice(expert, expert + 1)
        self.first = first
        self.step = step
        self.dtype: torch.dtype = tensor.dtype
        self.shape = (tensor.shape[1] // step,)

    def __getitem__(self, part: Part, /) -> Tensor:
        numbers = self.tensor[self.expert, :][0, self.first :: self.step]
        return numbers[part]


def split_experts(
    weights: Iterable[tuple[str, LazyTensor]],
) -> Iterator[tuple[str, LazyTensor]]:
    """(name, tensor) with one matrix and one bias an expert. Other tensors stay as they are.

    Raises ValueError for codes without scales or scales without codes.
    """
    waiting: dict[str, tuple[str, LazyTensor]] = {}  # matrix -> its codes or its scales
    for name, tensor in weights:
        match = STACKED.fullmatch(name)
        if match is None:
            yield name, tensor
            continue
        kind = match["kind"]
        if kind in ("_blocks", "_scales"):
            matrix = name.removesuffix(kind)
            other = waiting.pop(matrix, None)
            if other is None:
                waiting[matrix] = (kind, tensor)
                continue
            both = dict([other, (kind, tensor)])
            yield from mxfp4_experts(match, both["_blocks"], both["_scales"])
        elif kind == "_bias":
            for named, chosen in choices(match, tensor.shape[0], "bias"):
                yield named, ExpertBias(tensor, *chosen)
        elif not kind and len(tensor.shape) == 3:
            for named, chosen in choices(match, tensor.shape[0], "weight"):
                yield named, TransposedMatrix(tensor, *chosen)
        else:
            yield name, tensor
    for matrix, (kind, _) in waiting.items():
        lacking = "_scales" if kind == "_blocks" else "_blocks"
        raise ValueError(f"checkpoint: {matrix}{kind} has no {matrix}{lacking} beside it")


def choices(
    match: re.Match[str], num_experts: int, kind: str
) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """(name of a matrix or bias, (expert, first, step)) of all experts."""
    pieces = PIECES[match["name"]]
    for expert in range(num_experts):
        for first, piece in enumerate(pieces):
            yield f"{match['experts']}.{expert}.{piece}.{kind}", (expert, first, len(pieces))


def mxfp4_experts(
    match: re.Match[str], codes: LazyTensor, scales: LazyTensor
) -> Iterator[tuple[str, LazyTensor]]:
    """The matrices of all experts. Raises ValueError for tensors that are not MXFP4's."""
    stored = (tuple(codes.shape[:-1]), codes.shape[-1], codes.dtype, scales.dtype)
    if stored != (tuple(scales.shape), 16, torch.uint8, torch.uint8):
        raise ValueError(
            f"checkpoint: {match['experts']}.{match['name']} has blocks {list(codes.shape)} of "
            f"{codes.dtype} and scales {list(scales.shape)} of {scales.dtype}; accepted are uint8 "
            "blocks [experts, rows, blocks, 16] and uint8 scales [experts, rows, blocks]"
        )
    for named, chosen in choices(match, codes.shape[0], "weight"):
        yield named, Mxfp4Matrix(codes, scales, *chosen)
