"""The tensor-parallel group as layers see it: a rank, a size and four collectives. One rank needs no process group.

Collectives wait for the device only where the device is the CPU; with NCCL they are queued on the current stream, in
place on the tensors given, so a CUDA graph can hold them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # read when a group is made


@dataclass
class TensorParallel:
    """Invariant: all ranks make the same collective calls in the same order."""

    rank: int = 0
    size: int = 1
    group: Any = None  # ProcessGroupGloo or ProcessGroupNCCL

    @classmethod
    def join(cls, store: Any, rank: int, size: int, device: torch.device) -> TensorParallel:
        """Meets the other ranks at `store`, a torch.distributed.Store that is theirs alone.

        The group is one of our own, as torch's default group can exist only once in a process.
        """
        group: Any
        if device.type == "cuda":
            # The default is that NCCL's watchdog ends the process, rank 0's is the user's, when a peer is gone.
            before = os.environ.get(WATCHDOG)
            os.environ[WATCHDOG] = "0"
            group = dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
            os.environ.pop(WATCHDOG) if before is None else os.environ.update({WATCHDOG: before})
        else:
            gloo: Any = dist.ProcessGroupGloo
            settings = gloo._Options()
            settings._devices = [gloo.create_device(hostname="127.0.0.1")]
            group = gloo(store, rank, size, settings)
        tp = cls(rank, size, group)
        tp.minimum(0, device)  # connects NCCL, so that free memory is measured with its buffers taken
        return tp

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
            finish(self.group.allreduce([x], options(dist.AllreduceOptions)))
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Concatenates x [K, n] of all ranks along the last dimension, on every rank."""
        if self.size == 1:
            return x
        parts = x.new_empty(self.size * len(x), x.shape[1])
        if x.numel():
            finish(self.group._allgather_base(parts, x.contiguous(), options(AllgatherOptions)))
        return parts.unflatten(0, (self.size, len(x))).transpose(0, 1).flatten(1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank, in place."""
        if self.size > 1 and x.numel():
            finish(self.group.broadcast([x], options(dist.BroadcastOptions)))
        return x

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values."""
        if self.size == 1:
            return value
        x = torch.tensor([value], dtype=torch.int64, device=device)
        least = options(dist.AllreduceOptions)
        least.reduceOp = dist.ReduceOp.MIN
        finish(self.group.allreduce([x], least))
        return int(x)

    def close(self) -> None:
        """Closes the connections to the other ranks."""
        self.group = None


def options(kind: Any) -> Any:
    """What `torch.distributed`'s own functions pass for async_op=False: NCCL then runs on the current stream."""
    made = kind()
    made.asyncOp = False
    return made


def finish(work: Any) -> None:
    if work is not None:
        work.wait()
