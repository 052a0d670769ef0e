"""Part of the GPU check: the host's time of steady decoding, and a profiler's trace of it."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Result = dict[str, Any]
STEPS = 40  # that are measured
STEP = "nanovllm step"
WAITS = (
    "Synchronize",
    "cudaMalloc",
    "cudaFree",
    "cudaHostAlloc",
    "cudaMemcpy",
    "cuMemAlloc",
    "cuMemcpy",
)
WAITING_OPERATIONS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
)
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def trace(tiny: bool, count: int = 256, **sampling: Any) -> Result:
    """Steady decoding of `count` sequences: the host's time, calls that wait, the device's use.

    sampling: further fields of SamplingParams.
    """
    import torch

    engine = steady_engine(tiny, count, sampling)
    times = StepTimes()
    with times.of_collect():
        for _ in range(STEPS):
            times.begin()
            engine.step()
            times.end()
    step_us = 1e6 * statistics.median(times.steps)
    host = [1e6 * (step - wait) for step, wait in zip(times.steps, times.waited)]
    result: Result = {
        "speed": 1e6 * count / step_us,
        "step_us": step_us,
        "host_us": statistics.median(host),
        "host_us_worst": max(host),
        "graphs": engine.executor.runner.graphs is not None,
        **read_trace(profiled(engine), STEPS),
    }
    engine.abort_request([str(i) for i in range(count)])
    collected = result["waits"].get("cudaEventSynchronize", 0)
    unwanted = {name: n for name, n in result["waits"].items() if name != "cudaEventSynchronize"}
    result["ok"] = True
    if torch.cuda.is_available():
        result["ok"] = result["graphs"] and not unwanted and collected <= STEPS + 1
    result["summary"] = (
        f"{count} sequences: {step_us:.0f} us a step, host {result['host_us']:.0f} us of it, "
        f"device busy {result['busy']:.1%}, waits beside collect: {unwanted or 'none'}"
    )
    return result


def steady_engine(tiny: bool, count: int, sampling: dict[str, Any]) -> Any:
    """An engine that decodes `count` sequences, none of which ends soon."""
    from gpu.parts import make_llm

    from benchmarks.workloads import draw
    from nanovllm import SamplingParams

    engine = make_llm("tiny" if tiny else "0.6b", async_scheduling=True).llm_engine
    params = SamplingParams(
        **{"temperature": 0.6, "max_tokens": 200, "ignore_eos": True, **sampling}
    )
    prompts, _ = draw(count, 100, 120 if tiny else 900)
    for i, prompt in enumerate(prompts):
        ids = [token % engine.vocab_size for token in prompt]
        engine.add_request(str(i), ids, params)
    while engine.scheduler.waiting or len(engine.scheduler.running) < count:
        engine.step()
    for _ in range(20):
        engine.step()
    return engine


@dataclass
class StepTimes:
    """Seconds of each step, and seconds in which `collect` waited for the device."""

    steps: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    started: float = 0.0

    def begin(self) -> None:
        self.waited.append(0.0)
        self.started = time.perf_counter()

    def end(self) -> None:
        self.steps.append(time.perf_counter() - self.started)

    @contextmanager
    def of_collect(self) -> Iterator[None]:
        from nanovllm.runner.model_runner import PendingStep

        collect = PendingStep.collect

        def timed(pending: PendingStep) -> Any:
            start = time.perf_counter()
            try:
                return collect(pending)
            finally:
                self.waited[-1] += time.perf_counter() - start

        PendingStep.collect = timed  # type: ignore[method-assign]
        try:
            yield
        finally:
            PendingStep.collect = collect  # type: ignore[method-assign]


def profiled(engine: Any) -> list[dict[str, Any]]:
    """The events of a profiler's trace of STEPS steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as prof:
        for _ in range(STEPS):
            with record_function(STEP):
                engine.step()
    path = Path(tempfile.mkdtemp()) / "trace.json"
    prof.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def read_trace(events: list[dict[str, Any]], steps: int) -> Result:
    """Reads a profiler's trace: calls that may wait for the device, and the device's use of time."""
    calls: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    intervals = []
    ranges = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("name") == STEP and event.get("cat") == "user_annotation"
    ]
    for event in events:
        name = event.get("name", "")
        if may_wait(event):
            # The profiler's own calls come after the steps.
            is_in_step = any(start <= event["ts"] < stop for start, stop in ranges)
            calls[name] += is_in_step
        elif event.get("cat") in DEVICE_WORK:
            intervals.append((event["ts"], event["ts"] + event["dur"]))
            kernels[name[:80]] += event["dur"]
    return {
        "waits": {name: n for name, n in calls.items() if n},
        "busy": busy_share(intervals),
        "launches_a_step": len(intervals) / steps,
        "kernels_us": {name: us / steps for name, us in kernels.most_common(25)},
    }


def may_wait(event: dict[str, Any]) -> bool:
    """Whether the event is a call in which the host may wait for the device."""
    name = event.get("name", "")
    if name in WAITING_OPERATIONS:
        return True
    is_call = event.get("cat") in ("cuda_runtime", "cuda_driver")
    is_async = name.startswith(("cudaMemcpyAsync", "cuMemcpyAsync"))
    return is_call and not is_async and any(part in name for part in WAITS)


def busy_share(intervals: list[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last stop that some interval covers."""
    if not intervals:
        return 0.0
    intervals = sorted(intervals)
    first = intervals[0][0]
    end = first
    busy = 0.0
    for start, stop in intervals:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (end - first)
