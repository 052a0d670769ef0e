"""Checkpoint tensors that hold all experts of a layer, shown as one matrix an expert.

transformers 5 keeps `mlp.experts.gate_up_proj` [E, 2 * intermediate, hidden] and
`mlp.experts.down_proj` [E, hidden, intermediate] in memory. Checkpoints on the hub have
`mlp.experts.{e}.gate_proj.weight`, `up_proj` and `down_proj`. Layers read the latter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from nanovllm.loader.source import LazyTensor, Part, rows_and_columns

STACKED = re.compile(r"(?P<experts>.+\.experts)\.(?P<name>gate_up_proj|down_proj)")
PIECES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class ExpertSlice:
    """Rows of one expert of a tensor [experts, rows, columns]: a LazyTensor of two dimensions."""

    def __init__(self, tensor: LazyTensor, expert: int, rows: range) -> None:
        self.tensor = tensor
        self.expert = slice(expert, expert + 1)
        self.rows = rows
        self.shape = (len(rows), tensor.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def __getitem__(self, part: Part, /) -> Tensor:
        rows, columns = rows_and_columns(part)
        chosen = self.rows[rows]
        return self.tensor[self.expert, chosen.start : chosen.stop, columns][0]


def split_experts(
    weights: Iterable[tuple[str, LazyTensor]],
) -> Iterator[tuple[str, LazyTensor]]:
    """(name, tensor) with one matrix an expert. Other tensors stay as they are."""
    for name, tensor in weights:
        match = STACKED.fullmatch(name)
        if match is None or len(tensor.shape) != 3:
            yield name, tensor
            continue
        pieces = PIECES[match["name"]]
        count = tensor.shape[1] // len(pieces)
        for expert in range(tensor.shape[0]):
            for at, piece in enumerate(pieces):
                rows = range(at * count, (at + 1) * count)
                matrix = ExpertSlice(tensor, expert, rows)
                yield f"{match['experts']}.{expert}.{piece}.weight", matrix
