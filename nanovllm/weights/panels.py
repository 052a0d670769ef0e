"""A matrix in panels: the order in which the CPU's product reads it (`times_panel` in cpu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovllm.kernels import cpu, cpu_operators
from nanovllm.weights.base import Weight
from nanovllm.weights.dense import DenseWeight, matrix


class PanelWeight(DenseWeight):
    """The layer's parameter `weight`: rows while loading, panels while the model runs.

    A product of panels reads memory from one end to the other and needs no sum across
    lanes. A row of its result does not depend on the other rows.
    """

    in_panels = False  # each group of rows has panels of its own

    def begin_loading(self, layer: nn.Module) -> None:
        if self.in_panels:
            for rows in matrix(layer).data.chunk(self.num_groups):
                cpu.to_rows(rows)
        self.in_panels = False

    def finish_loading(self, layer: nn.Module) -> None:
        if not self.in_panels:
            for rows in matrix(layer).data.chunk(self.num_groups):
                cpu.to_panels(rows)
        self.in_panels = True

    def linear(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        assert self.in_panels
        if torch.compiler.is_compiling():
            return cpu_operators.linear_panels(x, matrix(layer), bias)
        out = cpu.linear_panels(x, matrix(layer), bias)
        assert out is not None, "x has the dtype of the weight"
        return out

    def swiglu(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return Weight.swiglu(self, layer, x, bias)

    def grouped(
        self,
        layer: nn.Module,
        x: Tensor,
        offsets: Tensor,
        num_groups: int,
        bias: Tensor | None,
    ) -> Tensor:
        assert self.in_panels
        out = cpu.grouped_panels(x, matrix(layer), offsets, bias)
        assert out is not None, "x has the dtype of the weight"
        return out

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        assert self.in_panels
        if torch.compiler.is_compiling():
            return cpu_operators.embedding_panels(ids, matrix(layer))
        out = cpu.embedding_panels(ids, matrix(layer))
        assert out is not None, "ids are int64"
        return out
