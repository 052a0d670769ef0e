"""The host's work on a decode step: what a GPU must not have to wait for.

The model and the GPU are left out. Decode graphs are functions that do nothing. Where a
step samples outside the graph, its tensors have no contents ("meta"), and launches of
Triton kernels are only counted. So the host does all of its own work, but for the calls
into CUDA's driver.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.limit import LARGE_GPU_STEP
from benchmarks.ours import PAGE, VOCAB_SIZE, Host
from benchmarks.workloads import draw
from nanovllm import kernels
from nanovllm.compilation import Compilation
from nanovllm.core.batch import Batch, pack, unpack
from nanovllm.parallel import TensorParallel
from nanovllm.runner.cuda_graphs import DecodeGraphs
from nanovllm.runner.model_runner import NO_ROWS, PendingStep
from nanovllm.runner.readouts.next_tokens import NextTokens, Sampled

FILTERS: dict[str, Any] = {
    "top_p": 0.95,
    "top_k": 20,
}  # with a temperature of 0.6: Qwen3's own defaults
PARTS = ("schedule", "prepare", "launch", "update", "sum")


class DeviceHalf:
    """What the host does for the device half of decode steps with graphs.

    records_filters: the sampler's graph has filters. Else filters run outside the graph.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, records_filters: bool) -> None:
        setup: Any = SimpleNamespace(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=PAGE,
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            config=SimpleNamespace(hidden_size=1),
            compilation=Compilation(),
        )
        self.graphs = DecodeGraphs(setup)
        self.graphs.parts = {"filters"} if records_filters else set()
        for size in self.graphs.sizes:
            self.graphs.graphs[size] = (do_nothing, do_nothing)
        logits = torch.empty(max_num_seqs, VOCAB_SIZE, dtype=torch.bfloat16, device="meta")
        head = SimpleNamespace(storage=None)
        self.model: Any = SimpleNamespace(head=head, logits=lambda hidden: logits[: len(hidden)])
        last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device="meta")
        self.next_tokens = NextTokens(TensorParallel(), last_tokens)
        self.hidden = torch.empty(max_num_seqs, 1, device="meta")

    def launch(self, batch: Batch[np.ndarray]) -> PendingStep:
        """`ModelRunner.run` for a decode batch."""
        assert self.graphs.has_graph(batch)
        if self.graphs.can_sample(batch):
            tokens = self.graphs.next_tokens(batch)
        else:
            self.graphs.hidden_states(batch)
            tokens = self.graphs.tokens[: len(batch.sample.at)]
            packed, layout = pack(batch)
            buffer = torch.from_numpy(packed).to("meta")
            self.next_tokens.read(self.model, self.hidden, unpack(layout, buffer, torch.float32))
        return PendingStep(Sampled(tokens), {}, NO_ROWS)


def do_nothing() -> None:
    pass


class LaunchCounter(TorchDispatchMode):
    """Counts the operations of torch that launch a kernel or copy: all but views and `empty`."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        returns = function._schema.returns
        is_view = any(r.alias_info and not r.alias_info.is_write for r in returns)
        if not is_view and not function._schema.name.startswith("aten::empty"):
            self.count += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def triton_launches() -> Iterator[list[str]]:
    """Inside the `with` Triton kernels are listed instead of launched, for any device."""
    launched: list[str] = []
    if find_spec("triton") is None:
        yield launched
        return
    ops = import_module("nanovllm.kernels.triton_ops")
    triton_for = kernels.triton_for
    run = ops.triton.JITFunction.run

    def note(kernel: Any, *args: object, **options: object) -> None:
        launched.append(kernel.__name__)

    kernels.triton_for = lambda x, name: ops
    ops.triton.JITFunction.run = note
    try:
        yield launched
    finally:
        kernels.triton_for = triton_for
        ops.triton.JITFunction.run = run


def host_times() -> dict[str, dict[str, float]]:
    """`host_time` of each kind of sampling."""
    found = {"temperature": host_time({}), "top-p + top-k": host_time(FILTERS)}
    if find_spec("triton") is not None:  # without it, filters wait for the device
        outside = host_time(FILTERS, records_filters=False)
        found["top-p + top-k outside the graph"] = outside
    return found


def host_time(
    filters: dict[str, Any], records_filters: bool = True, count: int = 256, steps: int = 200
) -> dict[str, float]:
    """Median microseconds of the host's work on a decode step of `count` sequences.

    Prompts have 100 to 1024 tokens. A step is scheduled, prepared (a batch is built),
    launched (changed inputs are sent, graphs are replayed, tokens are asked back), and
    its tokens update the scheduler. "launches": calls that queue work on a GPU.
    """
    prompts, _ = draw(count, 100, 1024)
    outputs = [steps + 50] * count
    longest = 1024 + outputs[0]
    host = Host(prompts, outputs, longest, LARGE_GPU_STEP, filters)
    device = DeviceHalf(count, longest, records_filters)
    seconds: list[np.ndarray] = []
    with torch.inference_mode(), triton_launches() as launched:
        while len(seconds) < steps:
            times = [time.perf_counter()]
            step = host.schedule()
            assert step is not None
            times.append(time.perf_counter())
            batch = host.prepare(step)
            times.append(time.perf_counter())
            is_decode = device.graphs.has_graph(batch)
            if is_decode:
                device.launch(batch).collect()
            times.append(time.perf_counter())
            host.update(step)
            times.append(time.perf_counter())
            if is_decode:
                seconds.append(np.diff(times))
        launched.clear()
        with LaunchCounter() as counter:
            device.launch(batch)
    parts = [1e6 * float(value) for value in np.median(seconds, axis=0)]
    total = 1e6 * statistics.median(float(each.sum()) for each in seconds)
    graphs = 2 if device.graphs.can_sample(batch) else 1
    copies = 2  # of the changed inputs and of the tokens, which are no copies on a CPU
    launches = graphs + copies + counter.count + len(launched)
    return {**dict(zip(PARTS, [*parts, total])), "launches": launches}
