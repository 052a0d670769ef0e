"""Sleeping frees a rank's weights and pages, waking brings them back. No step runs this file."""

from __future__ import annotations

import torch

from nanovllm.runner.device import free_gpu_memory, to_host
from nanovllm.runner.memory import record
from nanovllm.runner.model_runner import ModelRunner, SleepingWeights

TAGS = ("kv_cache", "weights")


def sleep(runner: ModelRunner, level: int) -> None:
    """Frees the KV cache and the weights. Level 1 keeps a copy of the weights on the host."""
    runner.drop_recordings()
    runner.attention.allocate(0)
    if "weights" not in runner.freed:  # a second sleep would lose the copy
        parameters = list(runner.model.parameters())
        copies = [to_host(parameter.data) for parameter in parameters] if level == 1 else None
        shapes = [parameter.shape for parameter in parameters]
        runner.sleeping_weights = SleepingWeights(shapes, copies)
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)
    runner.freed.update(TAGS)
    free_gpu_memory(runner.device)


def wake_up(runner: ModelRunner, tag: str) -> None:
    """Brings "weights" or "kv_cache" back. Without a copy, weights are read from the checkpoint."""
    if tag == "kv_cache":
        runner.attention.allocate(runner.num_blocks)
    else:
        bring_weights_back(runner)
    runner.freed.discard(tag)
    if not runner.freed:
        record(runner)


def bring_weights_back(runner: ModelRunner) -> None:
    sleeping = runner.sleeping_weights
    assert sleeping is not None
    parameters = list(runner.model.parameters())
    if sleeping.copies is not None:
        for parameter, copy in zip(parameters, sleeping.copies):
            parameter.data = copy.to(runner.device)
    else:
        for parameter, shape in zip(parameters, sleeping.shapes):
            parameter.data = parameter.data.new_zeros(shape)
        runner.load()
    runner.sleeping_weights = None
