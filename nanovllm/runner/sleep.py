"""Sleeping frees a rank's weights and pages, waking brings them back. No step runs this file."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.runner.device import free_gpu_memory, free_pinned_memory, to_host
from nanovllm.runner.memory import record
from nanovllm.runner.model_runner import ModelRunner, SleepingWeights

TAGS = ("kv_cache", "weights")


def sleep(runner: ModelRunner, level: int) -> None:
    """Frees the KV cache and the weights. Level 1 keeps a copy of the weights on the host."""
    runner.drop_recordings()
    runner.attention.allocate(0)
    if "weights" not in runner.freed:  # a second sleep would lose the copy
        parameters = list(runner.model.parameters())
        copies = (
            [pieces_on_host(parameter.data) for parameter in parameters] if level == 1 else None
        )
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
        free_pinned_memory(runner.device)
    runner.freed.discard(tag)
    if not runner.freed:
        record(runner)


def bring_weights_back(runner: ModelRunner) -> None:
    sleeping = runner.sleeping_weights
    assert sleeping is not None
    parameters = list(runner.model.parameters())
    if sleeping.copies is not None:
        for parameter, shape, pieces in zip(parameters, sleeping.shapes, sleeping.copies):
            parameter.data = joined(pieces, shape, runner.device)
    else:
        for parameter, shape in zip(parameters, sleeping.shapes):
            parameter.data = parameter.data.new_zeros(shape)
        runner.load()
    runner.sleeping_weights = None


def pieces_on_host(data: Tensor) -> list[Tensor]:
    """A copy of a parameter in pinned memory. On a CPU: the parameter itself.

    Torch rounds each piece of pinned memory up to a power of two, so the pieces have such
    sizes. Sizes of weights have many factors of two, so the pieces are few.
    """
    if data.is_cpu or not data.numel():
        return [data]
    return [to_host(piece) for piece in powers_of_two(data.reshape(-1))]


def powers_of_two(flat: Tensor) -> list[Tensor]:
    """Views of a tensor [n] whose lengths are the powers of two in n: 13 -> 8, 4, 1."""
    count = len(flat)
    bits = reversed(range(count.bit_length()))
    return list(flat.split([1 << bit for bit in bits if count >> bit & 1]))


def joined(pieces: list[Tensor], shape: torch.Size, device: torch.device) -> Tensor:
    """What `pieces_on_host` has copied, on the device again."""
    if len(pieces) == 1:
        return pieces[0].to(device).view(shape)
    data = pieces[0].new_empty(shape, device=device)
    for piece, part in zip(pieces, powers_of_two(data.view(-1))):
        part.copy_(piece)
    return data
