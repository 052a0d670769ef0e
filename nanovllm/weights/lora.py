"""LoRA (Hu et al., 2021): a matrix whose product also has the low-rank changes of adapters.

The change is computed on the input of the layer, so the matrix may have any storage
format. Does not know files, requests or ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.core.batch import ceil_div
from nanovllm.kernels import cpu
from nanovllm.loader.source import Source
from nanovllm.weights.base import Weight

PADDING = 16  # numbers: ranks are padded with zeros to a multiple, which suits panels


@dataclass
class Group:
    """Rows of the running step with one adapter. rows [n] int64; None stands for all rows."""

    adapter: int
    rows: Tensor | None


class LoRARows:
    """Which rows of the running step use which adapter.

    One object for all matrices of a model. The model runner fills it before a step and
    empties it afterwards. Rows without an adapter are in no group.
    """

    def __init__(self) -> None:
        self.groups: list[Group] = []

    @contextmanager
    def of(self, groups: list[Group]) -> Iterator[None]:
        """The groups of the step that runs inside the `with`."""
        before = self.groups
        self.groups = groups
        try:
            yield
        finally:
            self.groups = before

    @property
    def only(self) -> int | None:
        """The adapter of every row, 0 for none. None where the rows differ."""
        if not self.groups:
            return 0
        return self.groups[0].adapter if self.groups[0].rows is None else None

    @contextmanager
    def picked(self, at: Tensor) -> Iterator[None]:
        """Inside the `with`, row i is the token `at[i]` of the step. at: [K]."""
        groups = []
        for group in self.groups:
            if group.rows is None:
                groups.append(group)
                continue
            rows = torch.isin(at.long(), group.rows).nonzero().flatten()
            groups.append(Group(group.adapter, rows))
        with self.of(groups):
            yield


class Factor:
    """A matrix [out_features, in_features], in panels where the CPU has kernels for them."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        depth = matrix.shape[1]
        self.in_panels = matrix.is_cpu and cpu.fits_panels(depth, matrix.dtype)
        if self.in_panels:
            cpu.to_panels(matrix)

    def linear(self, x: Tensor) -> Tensor:
        """x [T, in_features] @ matrix.T -> [T, out_features]."""
        if self.in_panels:
            out = cpu.linear_panels(x, self.matrix, None)
            assert out is not None, "x has the dtype of the matrix"
            return out
        return kernels.linear(x, self.matrix, None)

    def add_linear(self, out: Tensor, x: Tensor) -> None:
        """out [T, out_features] += x [T, in_features] @ matrix.T."""
        if self.in_panels:
            added = cpu.add_linear_panels(out, x, self.matrix)
            assert added, "x and out have the dtype of the matrix"
        else:
            out.addmm_(x, self.matrix.T)


class Change:
    """The change of one adapter to one matrix, which may be several projections side by side.

    Invariant: it never changes, because recorded programs read its memory.
    """

    def __init__(self, a: Tensor, pieces: list[Piece], is_table: bool) -> None:
        """a: the first factors of the projections [sum of ranks, in_features].

        Of an embedding it is the table [vocabulary, rank].
        """
        self.table = a if is_table else None
        self.a = None if is_table else Factor(a)
        self.pieces = pieces

    def add_linear(self, out: Tensor, x: Tensor, rows: Tensor | None) -> None:
        """out [T, out_features] += the change of x [T, in_features], in these rows."""
        assert self.a is not None
        self._add(out, self.a.linear(x if rows is None else x[rows]), rows)

    def add_embedding(self, out: Tensor, ids: Tensor, rows: Tensor | None) -> None:
        """out [T, hidden] += the change of the embedding of ids [T], in these rows."""
        assert self.table is not None
        self._add(out, kernels.embedding(ids if rows is None else ids[rows], self.table), rows)

    def _add(self, out: Tensor, low: Tensor, rows: Tensor | None) -> None:
        """low: [n, sum of ranks], the first product."""
        into = out if rows is None else out[rows]  # a copy
        for piece in self.pieces:
            piece.b.add_linear(into[:, piece.columns], low[:, piece.ranks])
        if rows is not None:
            out[rows] = into


@dataclass
class Piece:
    """One projection. columns: of the output. ranks: of the first product."""

    columns: slice
    ranks: slice
    b: Factor  # [out_features, rank], scaled


@dataclass
class Factors:
    """The two factors of one projection. `a` is [rank, in_features], `b` [out_features, rank].

    first: the first of the projection's rows in the matrix.
    """

    a: Tensor
    b: Tensor
    first: int


def change(projections: list[Factors], is_table: bool) -> Change:
    """The change of a matrix by the factors of its projections."""
    ranks = [ceil_div(each.a.shape[0], PADDING) * PADDING for each in projections]
    stacked = projections[0].a.new_zeros(sum(ranks), projections[0].a.shape[1])
    pieces = []
    start = 0
    for each, rank in zip(projections, ranks):
        own = each.a.shape[0]
        stacked[start : start + own] = each.a
        b = each.b.new_zeros(each.b.shape[0], rank)
        b[:, :own] = each.b
        columns = slice(each.first, each.first + len(b))
        pieces.append(Piece(columns, slice(start, start + rank), Factor(b)))
        start += rank
    return Change(stacked.T.contiguous() if is_table else stacked, pieces, is_table)


class LoRAWeight(Weight):
    """A matrix of any format with the changes of adapters.

    An embedding that is the output head too has a change for each use.
    """

    def __init__(self, base: Weight, rows: LoRARows) -> None:
        self.base = base
        self.rows = rows
        self.linear_changes: dict[int, Change] = {}  # number of the adapter -> its change
        self.embedding_changes: dict[int, Change] = {}

    def sources(
        self,
        layer: nn.Module,
        name: str,
        shape: tuple[int, int],
        part: tuple[slice, slice],
        rows: slice,
    ) -> list[Source]:
        return self.base.sources(layer, name, shape, part, rows)

    def linear(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        out = self.base.linear(layer, x, bias)
        for group in self.rows.groups:
            found = self.linear_changes.get(group.adapter)
            if found is not None:
                found.add_linear(out, x, group.rows)
        return out

    def grouped(
        self,
        layer: nn.Module,
        x: Tensor,
        offsets: Tensor,
        num_groups: int,
        bias: Tensor | None,
    ) -> Tensor:
        """Adapters do not change experts."""
        return self.base.grouped(layer, x, offsets, num_groups, bias)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        out = self.base.embedding(layer, ids)
        for group in self.rows.groups:
            found = self.embedding_changes.get(group.adapter)
            if found is not None:
                found.add_embedding(out, ids, group.rows)
        return out

    def begin_loading(self, layer: nn.Module) -> None:
        self.base.begin_loading(layer)

    def finish_loading(self, layer: nn.Module) -> None:
        self.base.finish_loading(layer)
