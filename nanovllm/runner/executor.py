"""Who runs the model: a rank in this process, alone or under torchrun; `ranks.py` has the one that starts processes.

The engine launches batches and calls ranks through an `Executor`, and knows no more of tensor parallelism.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.engine.batch import Batch
from nanovllm.errors import ValidationError
from nanovllm.models.config import check_shards
from nanovllm.models.decoder import CausalLM
from nanovllm.parallel import TensorParallel
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.setup import Setup

LAUNCHES = itertools.count()  # engines of this process under torchrun; each has its own part of the common store


class EngineDeadError(RuntimeError):
    """A rank has failed, or the engine was closed: nothing can be computed any more, a new engine is needed."""


class Executor:
    """One rank, in this process: the only one, or under torchrun one of many that all do the same."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.num_blocks = runner.num_blocks
        # At exit too: gloo's threads, if they are found running when the process ends, abort it.
        weakref.finalize(self, runner.tp.close)

    def launch(self, batch: Batch) -> Any:
        """Queues a step; `.collect()` of what it returns waits for the results."""
        return self.runner.launch(batch)

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        """Calls a method of every rank's ModelRunner by its name, or method(worker, ...); one result a rank."""
        return [call(self.runner, method, args, kwargs or {})]

    def close(self) -> None:
        """Ends the other ranks."""
        self.runner.tp.close()


def make_executor(setup: Setup) -> Executor:
    """Loads the model on all ranks. Raises ValueError, before anything is started, for what cannot be sharded."""
    args = setup.args
    size, backend = args.tensor_parallel_size, args.distributed_executor_backend
    check_shards(setup.config, size)
    if backend == "uni" and size > 1:
        raise ValueError(
            f"distributed_executor_backend='uni' runs one rank, and tensor_parallel_size={size}; accepted is 'mp'"
        )
    if backend == "external_launcher":
        return Executor(ModelRunner(setup, join_torchrun(setup, size)))
    if size == 1:
        return Executor(ModelRunner(setup))
    if setup.device.type == "cuda":
        first, count = setup.device.index or 0, torch.cuda.device_count()
        if first + size > count:
            raise ValueError(
                f"tensor_parallel_size={size} needs as many GPUs from {setup.device} on, and there are {count}; "
                "accepted is at most that, or device='cpu'"
            )
    from nanovllm.runner.ranks import SpawnedExecutor  # one rank needs nothing of it

    return SpawnedExecutor(setup, size)


def join_torchrun(setup: Setup, size: int) -> TensorParallel:
    """This process's place among those that torchrun started: runs of `size` consecutive ranks are one model."""
    try:
        rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except KeyError as err:
        raise ValueError(
            f"distributed_executor_backend='external_launcher' needs {err} in the environment: start the script with "
            "torchrun, or leave the argument out"
        ) from None
    if world % size:
        raise ValueError(
            f"tensor_parallel_size={size} must divide the number of processes that torchrun started, {world}"
        )
    if setup.device.type == "cuda":
        if local < torch.cuda.device_count():  # else each process has been shown one GPU, its own
            setup.device = torch.device("cuda", local)
        torch.cuda.set_device(setup.device)
    if size == 1:
        return TensorParallel()
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
    else:
        store, _, _ = next(dist.rendezvous("env://"))
    part = dist.PrefixStore(f"nanovllm/{next(LAUNCHES)}/{rank // size}", store)
    return TensorParallel.join(part, rank % size, size, setup.device)


def call(runner: ModelRunner, method: str | Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if callable(method):
        return method(Worker(runner), *args, **kwargs)
    for owner in (Worker(runner), runner):
        if not method.startswith("_") and callable(found := getattr(owner, method, None)):
            return found(*args, **kwargs)
    raise ValidationError(f"collective_rpc: the worker has no method {method!r}, nor has its model runner")


class Worker:
    """What vLLM calls a worker, as far as functions and method names that are sent to one need it."""

    def __init__(self, runner: ModelRunner) -> None:
        self.model_runner = runner
        self.rank, self.device = runner.tp.rank, runner.device

    @property
    def worker(self) -> Worker:
        """vLLM's driver wraps its worker; scripts write `driver_worker.worker.model_runner`."""
        return self

    def get_model(self) -> CausalLM:
        return self.model_runner.model

    def reload_weights(self) -> None:
        """Reads the checkpoint once more into the running model."""
        self.model_runner.load(self.model_runner.model)
