"""Chooses how the ranks run: one in this process, processes of our own, or torchrun's."""

from __future__ import annotations

import torch

from nanovllm.models.config import check_shards
from nanovllm.runner.executor import Executor, join_torchrun
from nanovllm.runner.setup import Setup
from nanovllm.runner.start import make_runner


def make_executor(setup: Setup) -> Executor:
    """Loads the model on all ranks.

    Raises ValueError for a model that cannot be sharded so, before any process is
    started.
    """
    size = setup.args.tensor_parallel_size
    backend = setup.args.distributed_executor_backend
    check_shards(setup.config, size)
    if backend == "uni" and size > 1:
        raise ValueError(
            f"distributed_executor_backend='uni' runs one rank, and tensor_parallel_size={size}; "
            "accepted is 'mp'"
        )
    if backend == "external_launcher":
        return Executor(make_runner(setup, join_torchrun(setup, size)))
    if size == 1:
        return Executor(make_runner(setup))
    if setup.device.type == "cuda":
        first = setup.device.index or 0
        count = torch.cuda.device_count()
        if first + size > count:
            raise ValueError(
                f"tensor_parallel_size={size} needs as many GPUs from {setup.device} on, and there "
                f"are {count}; accepted is at most that, or device='cpu'"
            )
    from nanovllm.runner.ranks import SpawnedExecutor  # one rank needs nothing of it

    return SpawnedExecutor(setup, size)
