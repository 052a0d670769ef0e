"""RMSNorm over all heads of a token at once, on one rank or several."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.kernels.choice import compiled
from nanovllm.layers.norm import RMSNorm
from nanovllm.loader.source import Source
from nanovllm.parallel import TensorParallel


class HeadsRMSNorm(RMSNorm):
    """RMSNorm whose mean is over the heads of all ranks (OLMo 2, OLMoE).

    heads: the number of heads of the whole model. A rank has the weights of its heads.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        eps: float,
        tp: TensorParallel,
        round_once: bool = False,
    ) -> None:
        part = tp.split(heads)
        super().__init__(len(part) * head_dim, eps, round_once=round_once)
        self.part = slice(part.start * head_dim, part.stop * head_dim)
        self.total = heads * head_dim
        self.tp = tp

    def sources(self, prefix: str) -> list[Source]:
        """A slice of the checkpoint tensor fills the weight."""
        return [Source(f"{prefix}.weight", (self.total,), (self.part,), self.weight)]

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [T, size] in place."""
        if self.tp.size == 1:
            return kernels.rms_norm_in_place(x, self.weight, self.eps, self.round_once)
        # Every rank has equally many heads, so the mean is the mean of the ranks' means.
        mean = self.tp.all_reduce(mean_square(x)) / self.tp.size
        return x.copy_(normalised(x, mean, self.weight, self.eps, self.round_once))


@compiled("x")
def mean_square(x: Tensor) -> Tensor:
    """[T, size] -> [T, 1] float32."""
    return x.float().square().mean(-1, keepdim=True)


@compiled("x", "mean")
def normalised(x: Tensor, mean: Tensor, weight: Tensor, eps: float, round_once: bool) -> Tensor:
    """`kernels.rms_norm` of x [T, size] with another mean of squares [T, 1]."""
    normed = x.float() * torch.rsqrt(mean + eps)
    if not round_once:
        normed = normed.to(x.dtype)
    return weight * normed
