"""Runs the model on one rank in this process, alone or under torchrun.

`ranks.py` starts processes for further ranks. The engine reaches all ranks through an
`Executor`. Nothing here knows scheduling.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from nanovllm.core.batch import Batch
from nanovllm.core.step import StepResult
from nanovllm.errors import ValidationError
from nanovllm.models.base import LanguageModel
from nanovllm.parallel import TensorParallel
from nanovllm.runner import sleep
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.setup import Setup

Method = str | Callable[..., object]
# Numbers this process's engines under torchrun, because each needs its own store prefix.
ENGINE_NUMBERS = itertools.count()


class EngineDeadError(RuntimeError):
    """A rank has failed, or the engine was closed. Only a new engine can compute."""


class PendingStep(Protocol):
    """A launched step. `collect` waits for its result."""

    def collect(self) -> StepResult: ...


class Executor:
    """One rank in this process.

    Under torchrun each process has an executor, and all processes run the same steps.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.num_blocks = runner.num_blocks
        # Also at exit, because gloo's threads abort a process that ends while they run, and
        # NCCL's destructor waits for graphs that may be destroyed after it.
        weakref.finalize(self, runner.close)

    def launch(self, batch: Batch[np.ndarray]) -> PendingStep:
        """Queues a step, and does not wait for it."""
        return self.runner.launch(batch)

    def collective_rpc(
        self, method: Method, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> list[object]:
        """Calls `method(worker, ...)`, or the worker's method of that name, on each rank.

        Returns one result for each rank. Raises ValidationError for an unknown name.
        """
        return [call(self.runner, method, args, kwargs or {})]

    def close(self) -> None:
        """Closes the connections to the other ranks, and ends the ranks of ranks.py."""
        self.runner.close()


def join_torchrun(setup: Setup, size: int) -> TensorParallel:
    """Joins the ranks of this process's model. Raises ValueError outside torchrun.

    `size` consecutive ranks of torchrun are one model.
    """
    try:
        rank = int(os.environ["RANK"])
        world = int(os.environ["WORLD_SIZE"])
        local = int(os.environ["LOCAL_RANK"])
    except KeyError as err:
        raise ValueError(
            f"distributed_executor_backend='external_launcher' needs {err} in the environment: "
            "start the script with torchrun, or leave the argument out"
        ) from None
    if world % size:
        raise ValueError(
            f"tensor_parallel_size={size} must divide the number of processes that torchrun "
            f"started, {world}"
        )
    if setup.device.type == "cuda":
        if local < torch.cuda.device_count():  # else each process sees only its own GPU
            setup.device = torch.device("cuda", local)
        torch.cuda.set_device(setup.device)
    if size == 1:
        return TensorParallel()
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
    else:
        store, _, _ = next(dist.rendezvous("env://"))
    own_store = dist.PrefixStore(f"nanovllm/{next(ENGINE_NUMBERS)}/{rank // size}", store)
    return TensorParallel.join(own_store, rank % size, size, setup.device)


def call(
    runner: ModelRunner, method: Method, args: tuple[object, ...], kwargs: dict[str, object]
) -> object:
    """Calls `method(worker, ...)`, or the worker's or runner's method of that name."""
    worker = Worker(runner)
    if callable(method):
        return method(worker, *args, **kwargs)
    if not method.startswith("_"):
        for owner in (worker, runner):
            found = getattr(owner, method, None)
            if callable(found):
                return found(*args, **kwargs)
    raise ValidationError(
        f"collective_rpc: the worker has no method {method!r}, nor has its model runner"
    )


class Worker:
    """The object that `collective_rpc` passes to functions. vLLM uses the same name."""

    def __init__(self, runner: ModelRunner) -> None:
        self.model_runner = runner
        self.rank = runner.tp.rank
        self.device = runner.device

    @property
    def worker(self) -> Worker:
        """Itself, because scripts for vLLM read `driver_worker.worker.model_runner`."""
        return self

    def get_model(self) -> LanguageModel:
        return self.model_runner.model

    def reload_weights(self) -> None:
        """Loads the checkpoint again into the model."""
        self.model_runner.load()

    def load_adapter(self, number: int, folder: str) -> None:
        self.model_runner.load_adapter(number, folder)

    def unload_adapter(self, number: int) -> None:
        self.model_runner.unload_adapter(number)

    def sleep(self, level: int = 1) -> None:
        sleep.sleep(self.model_runner, level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        for tag in sorted(self.model_runner.freed.intersection(tags or sleep.TAGS), reverse=True):
            sleep.wake_up(self.model_runner, tag)
