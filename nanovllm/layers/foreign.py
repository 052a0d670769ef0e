"""Layers that take the place of torch's own in a model that another library wrote.

They are called as `nn.Linear` and `nn.Embedding` are, with any number of leading
dimensions, and they have the checkpoint names of the modules that they replace.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovllm.layers.linear import (
    EVERYTHING,
    Matrix,
    RowParallelLinear,
    VocabParallelEmbedding,
    span,
)
from nanovllm.loader.source import Source
from nanovllm.parallel import TensorParallel
from nanovllm.weights.dense import matrix


class ColumnLinear(Matrix):
    """x [..., in] -> [..., out of this rank], or [..., out] with `gather`.

    The rows of the matrix are `chunks` equal matrices one below the other. A rank gets its
    part of each of them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        tp: TensorParallel,
        *,
        chunks: int = 1,
        gather: bool = False,
    ) -> None:
        size = out_features // chunks  # rows of one chunk
        part = tp.split(size)
        super().__init__(len(part) * chunks, in_features, bias)
        starts = range(0, out_features, size)
        self.parts = [range(start + part.start, start + part.stop) for start in starts]
        self.shape = (out_features, in_features)  # of the whole matrix
        self.in_features = in_features
        self.out_features = len(part) * chunks  # of this rank
        self.tp = tp
        self.gather = gather

    def sources(self, prefix: str) -> list[Source]:
        """A slice of the rows of each chunk fills the rows, one after the other."""
        found: list[Source] = []
        start = 0
        for part in self.parts:
            rows = slice(start, start + len(part))
            start = rows.stop
            piece = (span(part), EVERYTHING)
            found += self.storage.sources(self, prefix, self.shape, piece, rows)
            if self.bias is not None:
                shape = self.shape[:1]
                found.append(Source(f"{prefix}.bias", shape, (span(part),), self.bias[rows]))
        return found

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)  # [T, in]
        out = self.storage.linear(self, flat, self.bias)
        if self.gather:
            out = self.tp.gather(out)
        return out.view(*x.shape[:-1], out.shape[-1])


class RowLinear(RowParallelLinear):
    """x [..., in of this rank] -> [..., out], summed over the ranks.

    split_input: x has all of its columns on every rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        tp: TensorParallel,
        *,
        split_input: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, tp)
        self.in_features = len(self.part)  # of this rank
        self.out_features = out_features
        self.split_input = split_input

    def forward(self, x: Tensor) -> Tensor:
        if self.split_input:
            x = x[..., span(self.part)]
        out = super().forward(x.reshape(-1, self.in_features))
        return out.view(*x.shape[:-1], out.shape[-1])


class TokenEmbedding(VocabParallelEmbedding):
    """Token ids of any shape -> [..., hidden]. `logits` is the output head of a tied model."""

    def __init__(self, num_embeddings: int, embedding_dim: int, tp: TensorParallel) -> None:
        super().__init__(num_embeddings, embedding_dim, tp)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim

    def forward(self, token_ids: Tensor) -> Tensor:
        rows = super().forward(token_ids.reshape(-1))
        return rows.view(*token_ids.shape, -1)


class OutputHead(VocabParallelEmbedding):
    """Hidden states [..., hidden] -> logits [..., vocabulary], on every rank."""

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__(out_features, in_features, tp)
        self.in_features = in_features
        self.out_features = out_features
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.rows), requires_grad=False)

    def sources(self, prefix: str) -> list[Source]:
        """The rows of this rank, and their biases."""
        found = super().sources(prefix)
        if self.bias is not None:
            rows = slice(0, len(self.part))
            part = (span(self.part),)
            found.append(Source(f"{prefix}.bias", self.shape[:1], part, self.bias[rows]))
        return found

    def logits(self, x: Tensor) -> Tensor:
        """[K, hidden] -> [K, vocabulary]."""
        local = self.storage.linear(self, x, self.bias)  # [K, rows]
        every = self.tp.gather(local)  # [K, rows * ranks]
        return every[:, : self.shape[0]].contiguous()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.logits(x.reshape(-1, self.in_features))
        return logits.view(*x.shape[:-1], -1)


class TiedHead(nn.Module):
    """The output head of a model whose embedding is the head too. It has no parameter."""

    def __init__(self, embedding: TokenEmbedding) -> None:
        super().__init__()
        self.embedding = [embedding]  # a list, so that the embedding is no child of this module

    @property
    def weight(self) -> Tensor:
        """The embedding's matrix."""
        return matrix(self.embedding[0])

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary]."""
        logits = self.embedding[0].logits(x.reshape(-1, x.shape[-1]))
        return logits.view(*x.shape[:-1], -1)
