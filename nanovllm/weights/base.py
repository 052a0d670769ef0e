"""How the matrix of a layer lies in memory.

A layer knows what its matrix is for. A weight knows how the matrix is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.loader.source import Source


class Weight(ABC):
    """The storage format of one matrix [out_features, in_features].

    The tensors are parameters of the layer, so they have the names of checkpoints
    (`qkv_proj.weight`). A Weight stores no tensor and no layer. Each method gets the
    layer, because trainers replace parameters. A Weight may wrap another one and add to
    its `linear`.
    """

    @abstractmethod
    def sources(
        self,
        layer: nn.Module,
        name: str,
        shape: tuple[int, int],
        part: tuple[slice, slice],
        rows: slice,
    ) -> list[Source]:
        """What fills `rows` of the matrix: the slices `part` of a checkpoint matrix.

        name: the name of the checkpoint matrix. shape: the shape of the whole checkpoint
        matrix.
        """

    @abstractmethod
    def linear(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in_features] @ matrix.T + bias [out_features] -> [T, out_features]."""

    def swiglu(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """`kernels.silu_and_mul` of `linear`: [T, in_features] -> [T, out_features / 2].

        A format may have one kernel for both.
        """
        return kernels.silu_and_mul(self.linear(layer, x, bias))

    def grouped(
        self,
        layer: nn.Module,
        x: Tensor,
        offsets: Tensor,
        num_groups: int,
        bias: Tensor | None,
    ) -> Tensor:
        """The product of a matrix that is num_groups matrices, one below the other.

        x [n, in_features] has the rows of each group side by side: group g begins at
        offsets[g]. offsets: int32 [num_groups + 1], on the device of x. bias:
        [out_features]. Returns [n, out_features / num_groups], with zeros in the rows
        from offsets[num_groups] on. Does not wait for the device.

        This definition multiplies every row with all groups. A format for experts has a
        better one.
        """
        rows = torch.arange(x.shape[0], device=x.device)
        group = torch.searchsorted(offsets.long(), rows, right=True) - 1
        everything = self.linear(layer, x, bias).unflatten(-1, (num_groups, -1))
        own = everything[rows, group.clamp(max=num_groups - 1)]
        return torch.where((group < num_groups)[:, None], own, 0)

    @abstractmethod
    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """Rows ids [T] int64 of the matrix -> [T, in_features]."""

    @abstractmethod
    def begin_loading(self, layer: nn.Module) -> None:
        """Puts the tensors into the form of the checkpoint, which `sources` fill."""

    @abstractmethod
    def finish_loading(self, layer: nn.Module) -> None:
        """Puts the tensors into the form that `linear` and `embedding` read."""
