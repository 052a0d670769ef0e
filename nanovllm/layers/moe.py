"""Mixture of experts (Shazeer et al., 2017): each token runs through a few of many MLPs.

A rank holds a slice of every expert's intermediate size, or with expert parallelism some
experts as a whole. Either way the ranks sum their results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.kernels import moe
from nanovllm.kernels.moe import Routes
from nanovllm.layers.linear import EVERYTHING, ColumnParallelLinear, Matrix, span
from nanovllm.loader.source import Source
from nanovllm.parallel import TensorParallel


@dataclass(frozen=True)
class ExpertSizes:
    """num_experts MLPs of hidden_size -> intermediate_size -> hidden_size."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    bias: bool = False


@dataclass(frozen=True)
class Piece:
    """A checkpoint matrix of every expert. shape: of the whole matrix. part: this rank's slice."""

    name: str
    shape: tuple[int, int]
    part: tuple[slice, slice]

    @property
    def rows(self) -> range:
        """The rows of the slice."""
        return range(self.shape[0])[self.part[0]]

    @property
    def columns(self) -> range:
        """The columns of the slice."""
        return range(self.shape[1])[self.part[1]]


class ExpertMatrices(Matrix):
    """x [n, in], sorted by expert -> [n, out of an expert].

    The matrices of this rank's experts lie one below the other: [experts * out, in]. An
    expert's matrix has several pieces one below the other, so they take one product.
    """

    def __init__(self, num_experts: int, experts: range, pieces: list[Piece], bias: bool) -> None:
        """num_experts: of the checkpoint. experts: of this rank."""
        out_features = sum(len(piece.rows) for piece in pieces)
        in_features = len(pieces[0].columns)
        super().__init__(len(experts) * out_features, in_features, bias, num_groups=len(experts))
        self.num_experts = num_experts
        self.experts = experts
        self.pieces = pieces

    def sources(self, prefix: str) -> list[Source]:
        """prefix: "...experts.down_proj" is filled from "...experts.0.down_proj" and so on."""
        parent = prefix.rpartition(".")[0]
        found: list[Source] = []
        start = 0
        for expert in self.experts:
            for piece in self.pieces:
                name = f"{parent}.{expert}.{piece.name}"
                rows = slice(start, start + len(piece.rows))
                start = rows.stop
                found += self.storage.sources(self, name, piece.shape, piece.part, rows)
                if self.bias is not None:
                    shape = piece.shape[:1]
                    into = self.bias[rows]
                    found.append(Source(f"{name}.bias", shape, piece.part[:1], into))
        return found + self.of_other_ranks(parent)

    def of_other_ranks(self, parent: str) -> list[Source]:
        """The matrices of other ranks' experts. The model knows them and reads nothing of them."""
        nothing = torch.empty(0)
        found: list[Source] = []
        for expert in range(self.num_experts):
            if expert in self.experts:
                continue
            for piece in self.pieces:
                name = f"{parent}.{expert}.{piece.name}"
                none = slice(0, 0)
                found.append(Source(f"{name}.weight", piece.shape, (none, none), nothing))
                if self.bias is not None:
                    found.append(Source(f"{name}.bias", piece.shape[:1], (none,), nothing))
        return found

    def forward(self, x: Tensor, offsets: Tensor, has_bias: bool = True) -> Tensor:
        """offsets: int32 [experts + 1], see `kernels.moe.Groups`."""
        bias = self.bias if has_bias else None
        return self.storage.grouped(self, x, offsets, len(self.experts), bias)


class Experts(nn.Module):
    """All experts of a layer. Each is a SwiGLU feed-forward."""

    def __init__(self, sizes: ExpertSizes, tp: TensorParallel, expert_parallel: bool) -> None:
        """expert_parallel: the ranks share the experts instead of the intermediate size."""
        super().__init__()
        self.tp = tp
        everyone = range(sizes.num_experts)
        inner = range(sizes.intermediate_size)
        self.local = tp.split(len(everyone)) if expert_parallel else everyone
        part = span(inner if expert_parallel else tp.split(len(inner)))
        # One rank adds the bias of a row that several ranks sum.
        self.adds_bias = expert_parallel or tp.rank == 0
        up_shape = (sizes.intermediate_size, sizes.hidden_size)
        gate = Piece("gate_proj", up_shape, (part, EVERYTHING))
        up = Piece("up_proj", up_shape, (part, EVERYTHING))
        down = Piece("down_proj", up_shape[::-1], (EVERYTHING, part))
        self.gate_up_proj = ExpertMatrices(len(everyone), self.local, [gate, up], sizes.bias)
        self.down_proj = ExpertMatrices(len(everyone), self.local, [down], sizes.bias)

    def activation(self, gate_up: Tensor) -> Tensor:
        """[n, 2 * intermediate] -> [n, intermediate]."""
        return kernels.silu_and_mul(gate_up)

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        """[T, hidden] -> [T, hidden], summed over the ranks."""
        groups = moe.group_by_expert(routes.experts, self.local.start, len(self.local))
        rows = moe.gather(x, groups.tokens)  # [T * top_k, hidden]
        gate_up = self.gate_up_proj(rows, groups.offsets)  # [T * top_k, 2 * intermediate]
        y = self.down_proj(self.activation(gate_up), groups.offsets, self.adds_bias)
        return self.tp.all_reduce(moe.combine(y, groups.rows, routes.weights))


class Router(ColumnParallelLinear):
    """Chooses the experts of each token. Every rank has the whole router."""

    def __init__(
        self,
        sizes: ExpertSizes,
        top_k: int,
        renormalise: bool,
        name: str = "gate",
        bias: bool = False,
    ) -> None:
        """name: the checkpoint's name of the router. renormalise: see `kernels.moe.route`."""
        super().__init__(sizes.hidden_size, {name: sizes.num_experts}, bias, TensorParallel())
        self.top_k = top_k
        self.renormalise = renormalise

    def route(self, x: Tensor) -> Routes:
        """x [T, hidden]."""
        return moe.route(self(x), self.top_k, self.renormalise)


class MixtureOfExperts(nn.Module):
    """Router and experts."""

    def __init__(self, gate: Router, experts: Experts) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.experts(x, self.gate.route(x))
