"""The tensor-parallel group as layers see it: a rank, a size and four collectives.

One rank needs no process group. On a CPU a collective waits for its result. NCCL queues a
collective on the current stream and works in place, so a CUDA graph can record it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    BroadcastOptions,
)

WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # torch reads the variable when it makes a group


class Work(Protocol):
    """A started collective."""

    def wait(self, timeout: timedelta = ...) -> bool: ...


class Group(Protocol):
    """The methods of ProcessGroupGloo and ProcessGroupNCCL that this file calls.

    A method may return None instead of `Work` after a synchronous call.
    """

    def allreduce(self, tensors: list[Tensor], opts: AllreduceOptions) -> Work | None: ...
    def broadcast(self, tensors: list[Tensor], opts: BroadcastOptions) -> Work | None: ...
    def _allgather_base(
        self, output: Tensor, input: Tensor, opts: AllgatherOptions
    ) -> Work | None: ...
    def name(self) -> str: ...
    def abort(self) -> None: ...


Options = TypeVar("Options", AllreduceOptions, AllgatherOptions, BroadcastOptions)


@dataclass
class TensorParallel:
    """Invariant: all ranks make the same collective calls in the same order."""

    rank: int = 0
    size: int = 1
    group: Group | None = None
    progress: np.ndarray | None = None  # [size] int64 in shared memory: see `count`
    is_aborted: bool = False

    @classmethod
    def join(cls, store: dist.Store, rank: int, size: int, device: torch.device) -> TensorParallel:
        """Meets the other ranks at `store`, which only these ranks use.

        It is not torch's default group, because a process can have only one of those.
        """
        make_group = nccl_group if device.type == "cuda" else gloo_group
        tp = cls(rank, size, make_group(store, rank, size))
        # The first collective connects NCCL, because NCCL's buffers must exist before the
        # runner measures free memory.
        tp.minimum(0, device)
        return tp

    def split(self, total: int) -> range:
        """This rank's part of `total` items, which the number of ranks divides.

        If there are fewer items than ranks, several ranks share one item.
        """
        if total < self.size:
            start = self.rank * total // self.size
            return range(start, start + 1)
        share = total // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums x of any shape over the ranks, in place."""
        if self.size > 1:
            finish(self._open_group().allreduce([x], synchronous(AllreduceOptions())))
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Concatenates x [K, n] of all ranks along the last dimension: [K, size * n]."""
        if self.size == 1:
            return x
        parts = x.new_empty(self.size * len(x), x.shape[1])
        if x.numel():
            options = synchronous(AllgatherOptions())
            finish(self._open_group()._allgather_base(parts, x.contiguous(), options))
        by_rank = parts.unflatten(0, (self.size, len(x)))  # [size, K, n]
        return by_rank.transpose(0, 1).flatten(1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Copies rank 0's x of any shape to every rank, in place."""
        if self.size > 1 and x.numel():
            finish(self._open_group().broadcast([x], synchronous(BroadcastOptions())))
        return x

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values."""
        if self.size == 1:
            return value
        x = torch.tensor([value], dtype=torch.int64, device=device)
        options = synchronous(AllreduceOptions())
        options.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment]
        finish(self._open_group().allreduce([x], options))
        return int(x)

    def _open_group(self) -> Group:
        assert self.group is not None, "the connections to the other ranks are closed"
        self.count()
        return self.group

    def count(self) -> None:
        """Counts a step or collective that this rank begins.

        All ranks begin the same ones, so a rank that hangs has the smallest count.
        """
        if self.progress is not None:
            self.progress[self.rank] += 1

    def abort(self) -> None:
        """Ends this rank's collectives, whether or not the other ranks still take part.

        NCCL then waits until no CUDA graph holds a collective of the group. Any thread may
        call this, and a second call does nothing, because two aborts wait for each other.
        """
        if self.group is None or self.is_aborted or self.group.name() != "nccl":
            return
        self.is_aborted = True
        with suppress(RuntimeError):  # from connections that are broken already
            self.group.abort()

    def close(self) -> None:
        """Closes the connections to the other ranks. Graphs of collectives are freed before.

        Waits for no other rank: it may have ended, or wait for this one.
        """
        self.abort()
        self.group = None


def nccl_group(store: dist.Store, rank: int, size: int) -> Group:
    # By default NCCL's watchdog ends this process when another rank dies. Rank 0 is the
    # user's process, so the watchdog is off for this group.
    before = os.environ.get(WATCHDOG)
    os.environ[WATCHDOG] = "0"
    group = dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
    if before is None:
        del os.environ[WATCHDOG]
    else:
        os.environ[WATCHDOG] = before
    return cast(Group, group)


def gloo_group(store: dist.Store, rank: int, size: int) -> Group:
    gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack parts of the class
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return cast(Group, gloo(store, rank, size, options))


def synchronous(options: Options) -> Options:
    """Options of a call with async_op=False. NCCL then uses the current stream."""
    options.asyncOp = False
    return options


def finish(work: Work | None) -> None:
    if work is not None:
        work.wait()
