"""The tensor-parallel group as layers see it: a rank, a size and three collectives. One rank needs no process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TensorParallel:
    rank: int = 0
    size: int = 1
    group: Any = None  # torch.distributed.ProcessGroup

    def split(self, total: int) -> range:
        """This rank's part of `total` items that divide evenly; of fewer items than ranks, the one that it shares."""
        if total < self.size:
            start = self.rank * total // self.size
            return range(start, start + 1)
        share = total // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums x over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Concatenates x [..., n] of all ranks along the last dimension, on every rank."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank, in place."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=0)
        return x
