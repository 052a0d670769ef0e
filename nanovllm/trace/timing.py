"""Times of a step: how long the host launches and waits, how long the device computes."""

from __future__ import annotations

import time

import numpy as np
import torch

from nanovllm.core.batch import Batch
from nanovllm.core.step import StepResult
from nanovllm.runner.executor import Executor, Method, PendingStep


class DeviceClock:
    """Times of a GPU on the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.origin = self.mark()
        self.origin.synchronize()
        self.seconds = time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        """An event that the device reaches after all work that was queued before."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def time(self, event: torch.cuda.Event) -> float:
        """When the device reached the event. Waits until it has."""
        event.synchronize()
        return self.seconds + self.origin.elapsed_time(event) / 1e3


class TimedStep:
    """A pending step with its times, all in seconds of `time.perf_counter`."""

    def __init__(self, executor: Executor, batch: Batch[np.ndarray], clock: DeviceClock | None):
        self.clock = clock
        self.began = time.perf_counter()
        first = None if clock is None else clock.mark()
        self.pending: PendingStep = executor.launch(batch)
        last = None if clock is None else clock.mark()
        self.launched = time.perf_counter()
        self.marks = (first, last)
        self.collecting = 0.0  # when `collect` began
        self.collected = 0.0

    def collect(self) -> StepResult:
        self.collecting = time.perf_counter()
        result = self.pending.collect()
        self.collected = time.perf_counter()
        return result

    def device_times(self) -> tuple[float, float]:
        """When the device began and ended. Waits until it has."""
        first, last = self.marks
        if self.clock is None or first is None or last is None:
            return self.began, self.launched
        return self.clock.time(first), self.clock.time(last)


class TimedExecutor(Executor):
    """An executor whose steps are timed."""

    def __init__(self, executor: Executor) -> None:
        """executor: what runs the steps. Its ranks are running, so no other is made."""
        self.executor = executor
        self.runner = executor.runner
        self.num_blocks = executor.num_blocks
        device = executor.runner.device
        self.clock = DeviceClock(device) if device.type == "cuda" else None

    def launch(self, batch: Batch[np.ndarray]) -> TimedStep:
        return TimedStep(self.executor, batch, self.clock)

    def collective_rpc(
        self, method: Method, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> list[object]:
        return self.executor.collective_rpc(method, args, kwargs)

    def close(self) -> None:
        self.executor.close()
