"""A runner's memory: how many pages fit beside weights, the largest step and CUDA graphs; sleeping and waking.

Nothing here runs in a step.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from nanovllm.attention.base import zeroed
from nanovllm.cache.spec import row_bytes
from nanovllm.engine.batch import Batch
from nanovllm.runner.cuda_graphs import CaptureError, DecodeGraphs

if TYPE_CHECKING:
    from nanovllm.runner.model_runner import ModelRunner

logger = logging.getLogger("nanovllm")
CPU_CACHE_BYTES = 4 << 30
GPU_RESERVE_BYTES = 256 << 20  # for kernels loaded and buffers made later, where others leave less than our share


def num_blocks(runner: ModelRunner) -> int:
    """How many pages there are. Raises ValueError where they cannot hold one sequence of max_model_len."""
    args, page, block_size = runner.args, runner.attention.page_bytes(), runner.attention.spec.block_size
    needed = -(-runner.max_model_len // block_size)
    states = runner.max_num_seqs * row_bytes(runner.model.cache_specs())  # what is not in pages
    if args.num_gpu_blocks_override is not None:
        available, source = args.num_gpu_blocks_override, "num_gpu_blocks_override"
    elif args.kv_cache_memory_bytes is not None:
        available, source = (args.kv_cache_memory_bytes - states) // page, "kv_cache_memory_bytes"
    elif runner.device.type == "cuda":
        available, source = (free_gpu_bytes(runner) - states) // page, "gpu_memory_utilization"
    else:
        half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // runner.tp.size
        available, source = (
            (min(max(CPU_CACHE_BYTES, needed * page + states), half) - states) // page,
            "kv_cache_memory_bytes",
        )
    if available < needed:
        raise ValueError(
            f"max_model_len={runner.max_model_len} needs {needed} KV cache blocks of {block_size} tokens "
            f"({needed * page / 2**20:.0f} MiB), and there is room for {max(available, 0)} "
            f"({max(available, 0) * block_size} tokens): raise {source} or lower max_model_len"
        )
    return available


def lay_out(model: nn.Module) -> None:
    """Moves a CPU's weights, before they are there, into one piece of memory.

    Numpy's is on huge pages: with small ones, translating addresses took a fifth of the time of products of one row.
    """
    parameters = list(model.parameters())
    sizes = [-(-parameter.nbytes // 64) * 64 for parameter in parameters]
    pieces = zeroed((sum(sizes),), torch.uint8, torch.device("cpu")).split(sizes)
    for parameter, piece in zip(parameters, pieces):
        parameter.data = piece[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)


def free_memory(runner: ModelRunner) -> int:
    """Bytes that nobody uses on the GPU."""
    if runner.device.type != "cuda":
        return 0
    torch.cuda.synchronize(runner.device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(runner.device)[0]


def free_gpu_bytes(runner: ModelRunner) -> int:
    """What our share of the card leaves for pages, beside weights, the largest step there can be, and decode graphs.

    The share is gpu_memory_utilization of the whole card, or all that others leave of it. All is measured as the
    driver sees it, so kernels, library workspaces and fragmentation are in it.
    """
    total = torch.cuda.mem_get_info(runner.device)[1]
    share = min(total * runner.args.gpu_memory_utilization, runner.free_at_start - GPU_RESERVE_BYTES)
    free_memory(runner)  # what loading has left behind
    pages = profile_step(runner)
    torch.cuda.synchronize(runner.device)
    used = runner.free_at_start - torch.cuda.mem_get_info(runner.device)[0] - pages * runner.attention.page_bytes()
    graphs = graph_bytes(runner)
    runner.attention.allocate(0)
    free_memory(runner)
    return int(share - used - graphs)


def graph_bytes(runner: ModelRunner) -> int:
    """What decode graphs will take: the largest one's memory, and for each other as much as a second one adds."""
    before = free_memory(runner)
    record_graphs(runner, 1)  # libraries take what they then keep
    free = []
    for count in (1, 2):
        graphs = record_graphs(runner, count)
        free.append(free_memory(runner))
        others = len(graphs.sizes) - 1 if graphs else 0
        del graphs
    return before - free[0] + others * max(free[0] - free[1], 0)


@torch.inference_mode()
def record_graphs(runner: ModelRunner, count: int | None = None) -> DecodeGraphs | None:
    """Decode graphs of the `count` largest sizes (None: of all); None where there are none or one cannot be recorded.

    Raises RuntimeError where a step of several ranks fails by itself.
    """
    if runner.capture_stream is None:
        return None
    max_blocks = -(-runner.max_model_len // runner.attention.spec.block_size)
    graphs = DecodeGraphs(
        runner.max_num_seqs, max_blocks, runner.config.hidden_size, runner.dtype, runner.device, runner.capture_stream
    )
    for size in graphs.sizes[::-1][:count]:
        failure = ""
        try:
            with runner.on_device(), no_garbage_collection():
                graphs.record(
                    size,
                    lambda batch: runner.forward(batch, 1, 0, runner.max_model_len),
                    lambda hidden, batch: runner.next_tokens(runner.model.logits(hidden), batch),
                )
        except RuntimeError as err:
            if runner.tp.size > 1 and not isinstance(err, CaptureError):
                raise  # the other ranks are inside this step's collectives, and would not come to agree on anything
            failure = str(err) or type(err).__name__
        # All ranks replay or none does: padding makes their collectives differ.
        if not runner.tp.minimum(not failure, runner.device):
            reason = failure or "another rank failed"
            logger.warning("decoding goes on without CUDA graphs, as one of %d sequences failed: %s", size, reason)
            runner.capture_stream = None
            return None
    return graphs


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """An older engine's graphs that die while one is recorded would spoil it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@torch.inference_mode()
def profile_step(runner: ModelRunner) -> int:
    """Runs the largest batch there can be, on pages of its own, for its peak of memory; returns how many pages."""
    size, block_size = runner.max_num_batched_tokens, runner.attention.spec.block_size
    count = min(runner.max_num_seqs, size)
    length = min(-(-size // count), runner.max_model_len)
    blocks = -(-length // block_size)
    positions = np.tile(np.arange(length, dtype=np.int32), count)
    zeros = np.zeros(count * length, np.int32)
    batch = Batch(
        sizes=np.array([length, count * (length > 1), length, -1, -1], np.int32),
        token_ids=zeros,
        positions=positions,
        slot_mapping=positions,
        token_rows=zeros,
        query_start=np.arange(count + 1, dtype=np.int32) * length,
        context_lens=np.full(count, length, np.int32),
        block_tables=np.tile(np.arange(blocks, dtype=np.int32), (count, 1)),
        sample_at=np.arange(1, count + 1, dtype=np.int32) * length - 1,
        sample_rows=np.arange(count, dtype=np.int32),
        temperature=np.ones(count, np.float32),
        uniform=np.zeros(count, np.float32),
        filter_at=np.arange(count, dtype=np.int32),
        top_k=np.full(count, runner.config.vocab_size, np.int32),
        top_p=np.full(count, 0.9, np.float32),
        min_p=np.zeros(count, np.float32),
    )
    runner.attention.allocate(blocks)
    runner.launch(batch).collect()
    return blocks


@dataclass
class Asleep:
    """What is gone, and what brings the weights back: a copy on the host, or else the checkpoint."""

    gone: set[str]
    shapes: list[torch.Size]
    backup: list[Tensor] | None


def sleep(runner: ModelRunner, level: int) -> None:
    """Frees the KV cache and the weights; level 1 keeps a copy of these in the host's memory."""
    runner.graphs = None  # they hold the addresses of both
    if runner.programs is not None:
        runner.programs.clear()
    runner.attention.allocate(0)
    if runner.asleep is None or "weights" not in runner.asleep.gone:  # a second time would lose the copy
        parameters = list(runner.model.parameters())
        backup = [to_host(parameter.data) for parameter in parameters] if level == 1 else None
        runner.asleep = Asleep({"weights"}, [parameter.shape for parameter in parameters], backup)
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)
    runner.asleep.gone.add("kv_cache")
    free_memory(runner)


def wake_up(runner: ModelRunner, tag: str) -> None:
    """Brings "weights" or "kv_cache" back; weights that were dropped are read from the checkpoint again."""
    asleep = runner.asleep
    assert asleep is not None
    if tag == "kv_cache":
        runner.attention.allocate(runner.num_blocks)
    else:
        for i, parameter in enumerate(runner.model.parameters()):
            if asleep.backup is not None:
                parameter.data = asleep.backup[i].to(runner.device)
            else:
                parameter.data = parameter.data.new_zeros(asleep.shapes[i])
        if asleep.backup is None:
            runner.load(runner.model)
        asleep.backup = None
    asleep.gone.discard(tag)
    if not asleep.gone:
        runner.asleep, runner.graphs = None, record_graphs(runner)


def to_host(x: Tensor) -> Tensor:
    """A copy into pinned memory that does not wait for the device."""
    if not x.is_cuda:
        return x.cpu()
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
