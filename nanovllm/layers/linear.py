"""Linear and embedding layers, whole or sharded over tensor-parallel ranks.

Column-parallel layers hold a slice of the output features, row-parallel layers a slice of the input features; a column
layer followed by a row layer needs one all-reduce (Shoeybi et al., Megatron-LM, 2019). Each layer says which slice of
which checkpoint tensor fills it (`sources`), so a rank reads its shard only. Nothing outside layers/ knows of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovllm.loader.source import Source
from nanovllm.parallel import TensorParallel
from nanovllm.weights.select import new_weight

EVERYTHING = slice(None)


def span(part: range) -> slice:
    return slice(part.start, part.stop)


class Matrix(nn.Module):
    """A layer around one matrix. `storage` knows how it lies in memory; its tensors are parameters of this module."""

    def __init__(self, out_features: int, in_features: int, bias: bool = False) -> None:
        super().__init__()
        self.storage = new_weight(self, out_features, in_features)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def begin_loading(self) -> None:
        """Weights are as checkpoints have them from here on, to be read or written."""
        self.storage.begin_loading(self)

    def finish_loading(self) -> None:
        """Weights are as products read them from here on."""
        self.storage.finish_loading(self)


class ColumnParallelLinear(Matrix):
    """x [T, in] -> [T, out of this rank]: several checkpoint matrices side by side, as one product.

    `pieces` maps the checkpoint's names to how many times `unit` rows they have: ranks share out whole units (heads).
    """

    def __init__(self, in_features: int, pieces: dict[str, int], bias: bool, tp: TensorParallel, unit: int = 1) -> None:
        parts = {name: tp.split(count) for name, count in pieces.items()}
        super().__init__(sum(map(len, parts.values())) * unit, in_features, bias)
        self.in_features = in_features
        self.pieces = {  # name -> (rows in the checkpoint, this rank's range of them)
            name: (pieces[name] * unit, range(part.start * unit, part.stop * unit)) for name, part in parts.items()
        }

    def sources(self, prefix: str) -> list[Source]:
        parent = prefix.rpartition(".")[0]
        found: list[Source] = []
        at = 0
        for piece, (total, part) in self.pieces.items():
            name = f"{parent}.{piece}"
            rows = slice(at, at + len(part))
            found += self.storage.sources(self, name, (total, self.in_features), (span(part), EVERYTHING), rows)
            if self.bias is not None:
                found.append(Source(f"{name}.bias", (total,), (span(part),), self.bias[rows]))
            at += len(part)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.storage.linear(self, x, self.bias)


class RowParallelLinear(Matrix):
    """x [T, in of this rank] -> [T, out], summed over the ranks. The bias is added once, by rank 0."""

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: TensorParallel) -> None:
        part = tp.split(in_features)
        super().__init__(out_features, len(part), bias)
        self.tp, self.part = tp, part
        self.shape = (out_features, in_features)  # of the whole matrix

    def sources(self, prefix: str) -> list[Source]:
        found = self.storage.sources(self, prefix, self.shape, (EVERYTHING, span(self.part)), EVERYTHING)
        if self.bias is not None:
            found.append(Source(f"{prefix}.bias", self.shape[:1], (EVERYTHING,), self.bias))
        return found

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.tp.rank == 0 else None
        return self.tp.all_reduce(self.storage.linear(self, x, bias))


class VocabParallelEmbedding(Matrix):
    """Token embedding, and by `logits` the output head, each rank holding a run of ceil(vocabulary / ranks) rows."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        rows = -(-vocab_size // tp.size)
        super().__init__(rows, hidden_size)
        self.tp, self.rows = tp, rows
        self.part = range(min(tp.rank * rows, vocab_size), min((tp.rank + 1) * rows, vocab_size))
        self.shape = (vocab_size, hidden_size)  # of the whole matrix
        for parameter in self.parameters():  # rows that pad the last rank
            parameter.data[len(self.part) :] = 0

    def sources(self, prefix: str) -> list[Source]:
        return self.storage.sources(self, prefix, self.shape, (span(self.part), EVERYTHING), slice(0, len(self.part)))

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, hidden]."""
        if self.tp.size == 1:
            return self.storage.embedding(self, token_ids)
        local = token_ids - self.part.start
        mine = (local >= 0) & (local < len(self.part))
        rows = self.storage.embedding(self, local.clamp(0, self.rows - 1))
        return self.tp.all_reduce(rows * mine[:, None])

    def logits(self, x: Tensor) -> Tensor:
        """[K, hidden] -> [K, vocabulary], on every rank."""
        # Contiguous even where ranks hold padding: samplers read whole rows.
        return self.tp.gather(self.storage.linear(self, x, None))[:, : self.shape[0]].contiguous()
