"""A matrix as checkpoints have it: one row of numbers an output feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.kernels import moe
from nanovllm.loader.source import Source
from nanovllm.weights.base import Weight


class DenseWeight(Weight):
    """The layer's parameter `weight` [out_features, in_features]."""

    def __init__(
        self, layer: nn.Module, out_features: int, in_features: int, num_groups: int = 1
    ) -> None:
        self.num_groups = num_groups
        weight = torch.empty(out_features, in_features)
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    def sources(
        self,
        layer: nn.Module,
        name: str,
        shape: tuple[int, int],
        part: tuple[slice, slice],
        rows: slice,
    ) -> list[Source]:
        return [Source(f"{name}.weight", shape, part, matrix(layer)[rows])]

    def begin_loading(self, layer: nn.Module) -> None:
        """Nothing to do: rows are the form that checkpoints have."""

    def finish_loading(self, layer: nn.Module) -> None:
        """Nothing to do: products read rows."""

    def linear(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.linear(x, matrix(layer), bias)

    def swiglu(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.swiglu_linear(x, matrix(layer), bias)

    def grouped(
        self,
        layer: nn.Module,
        x: Tensor,
        offsets: Tensor,
        num_groups: int,
        bias: Tensor | None,
    ) -> Tensor:
        return moe.grouped_linear(x, matrix(layer), offsets, bias)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        return kernels.embedding(ids, matrix(layer))


def matrix(layer: nn.Module) -> Tensor:
    """The layer's parameter `weight`."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
