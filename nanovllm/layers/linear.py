"""Linear and embedding layers, whole or sharded over tensor-parallel ranks.

Column-parallel layers hold a slice of the output features, row-parallel layers a slice of the input features; a column
layer followed by a row layer needs one all-reduce (Shoeybi et al., Megatron-LM, 2019). Each layer says which slice of
which checkpoint tensor fills it (`sources`), so a rank reads its shard only. Nothing outside layers/ knows of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.kernels import cpu
from nanovllm.layers.source import Source
from nanovllm.parallel import TensorParallel


def empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def span(part: range) -> slice:
    return slice(part.start, part.stop)


class Matrix(nn.Module):
    """A weight [out, in] as checkpoints have it, until `pack` puts it into the order that the CPU's product reads."""

    weight: nn.Parameter
    packed = False

    def pack(self) -> None:
        if not self.packed and self.weight.is_cpu:
            self.packed = cpu.pack(self.weight.data)

    def unpack(self) -> None:
        if self.packed:
            cpu.unpack(self.weight.data)
        self.packed = False


class ColumnParallelLinear(Matrix):
    """x [T, in] -> [T, out of this rank]: several checkpoint matrices side by side, as one product.

    `pieces` maps the checkpoint's names to how many times `unit` rows they have: ranks share out whole units (heads).
    """

    def __init__(self, in_features: int, pieces: dict[str, int], bias: bool, tp: TensorParallel, unit: int = 1) -> None:
        super().__init__()
        self.pieces: dict[str, tuple[int, range]] = {}  # (rows in the checkpoint, this rank's range of them)
        for name, count in pieces.items():
            part = tp.split(count)
            self.pieces[name] = count * unit, range(part.start * unit, part.stop * unit)
        out_features = sum(len(part) for _, part in self.pieces.values())
        self.weight = empty(out_features, in_features)
        self.bias = empty(out_features) if bias else None

    def sources(self, prefix: str) -> list[Source]:
        parent, found, at = prefix.rpartition(".")[0], [], 0
        for name, (total, part) in self.pieces.items():
            rows = slice(at, at + len(part))
            full = (total, self.weight.shape[1])
            found.append(Source(f"{parent}.{name}.weight", full, (span(part), slice(None)), self.weight[rows]))
            if self.bias is not None:
                found.append(Source(f"{parent}.{name}.bias", (total,), (span(part),), self.bias[rows]))
            at += len(part)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias, self.packed)


class RowParallelLinear(Matrix):
    """x [T, in of this rank] -> [T, out], summed over the ranks. The bias is added once, by rank 0."""

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.in_features = tp, in_features
        self.part = tp.split(in_features)
        self.weight = empty(out_features, len(self.part))
        self.bias = empty(out_features) if bias else None

    def sources(self, prefix: str) -> list[Source]:
        full = (self.weight.shape[0], self.in_features)
        found = [Source(f"{prefix}.weight", full, (slice(None), span(self.part)), self.weight)]
        if self.bias is not None:
            found.append(Source(f"{prefix}.bias", full[:1], (slice(None),), self.bias))
        return found

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.tp.rank == 0 else None
        return self.tp.all_reduce(kernels.linear(x, self.weight, bias, self.packed))


class VocabParallelEmbedding(Matrix):
    """Token embedding, and by `logits` the output head, each rank holding a run of ceil(vocabulary / ranks) rows."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.vocab_size = tp, vocab_size
        rows = -(-vocab_size // tp.size)
        self.part = range(min(tp.rank * rows, vocab_size), min((tp.rank + 1) * rows, vocab_size))
        self.weight = nn.Parameter(torch.zeros(rows, hidden_size), requires_grad=False)

    def sources(self, prefix: str) -> list[Source]:
        full = (self.vocab_size, self.weight.shape[1])
        return [Source(f"{prefix}.weight", full, (span(self.part), slice(None)), self.weight[: len(self.part)])]

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, hidden]."""
        if self.tp.size == 1:
            return kernels.embedding(token_ids, self.weight, self.packed)
        local = token_ids - self.part.start
        mine = (local >= 0) & (local < len(self.part))
        rows = kernels.embedding(local.clamp(0, len(self.weight) - 1), self.weight, self.packed)
        return self.tp.all_reduce(rows * mine[:, None])

    def logits(self, x: Tensor) -> Tensor:
        """[K, hidden] -> [K, vocabulary], on every rank."""
        # Contiguous even where ranks hold padding: samplers read whole rows.
        return self.tp.gather(kernels.linear(x, self.weight, None, self.packed))[:, : self.vocab_size].contiguous()
