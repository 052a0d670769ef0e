"""RMSNorm, alone or fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.loader.source import Source


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich, 2019).

    offset: what the factors have more than the weights of the checkpoint. round_once: see
    `kernels.rms_norm`.
    """

    def __init__(
        self, size: int, eps: float, offset: float = 0.0, round_once: bool = False
    ) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.round_once = round_once
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)

    def sources(self, prefix: str) -> list[Source]:
        """The whole checkpoint tensor fills the weight."""
        name = f"{prefix}.weight"
        shape = tuple(self.weight.shape)
        everything = slice(None)
        return [Source(name, shape, (everything,), self.weight)]

    def forward(self, x: Tensor) -> Tensor:
        """[T, size] -> [T, size]."""
        return kernels.rms_norm(x, self.weight, self.eps, self.offset, self.round_once)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(normalised sum, sum), both [T, size]. The sum is the new residual.

        May overwrite both arguments.
        """
        how = (self.eps, self.offset, self.round_once)
        return kernels.add_rms_norm(x, residual, self.weight, *how)
