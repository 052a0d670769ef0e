"""A runner's memory: how many pages fit beside weights, the largest step and CUDA graphs.

Nothing here runs in a step.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from nanovllm.cache.spec import row_bytes
from nanovllm.config import EngineArgs
from nanovllm.core.batch import AttentionMetadata, Batch, Part, SampleRows, Tokens, ceil_div
from nanovllm.kernels.choice import kernel_choice
from nanovllm.runner.cuda_graphs import CaptureError, DecodeGraphs
from nanovllm.runner.device import current, free_gpu_memory
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.pieces import CudaRecorder, Pieces
from nanovllm.sampling.filters import FiltersPart
from nanovllm.sampling.logprobs import LogprobsPart
from nanovllm.sampling.penalties import PenaltiesPart

logger = logging.getLogger("nanovllm")
CPU_CACHE_BYTES = 4 << 30
GPU_RESERVE_BYTES = (
    256 << 20
)  # for kernels and buffers made later, where other processes use the GPU


def num_blocks(runner: ModelRunner) -> int:
    """How many pages fit. Raises ValueError if they cannot hold one sequence of max_model_len."""
    setup = runner.setup
    page_bytes = runner.attention.page_bytes()
    state_bytes = setup.max_num_seqs * row_bytes(runner.model.cache_specs())  # not in pages
    needed = ceil_div(setup.max_model_len, setup.block_size)
    source = "kv_cache_memory_bytes"
    if setup.args.num_gpu_blocks_override is not None:
        source = "num_gpu_blocks_override"
        available = setup.args.num_gpu_blocks_override
    elif setup.args.kv_cache_memory_bytes is not None:
        available = (setup.args.kv_cache_memory_bytes - state_bytes) // page_bytes
    elif runner.device.type == "cuda":
        source = "gpu_memory_utilization"
        available = (free_gpu_bytes(runner) - state_bytes) // page_bytes
    else:
        wanted = max(CPU_CACHE_BYTES, needed * page_bytes + state_bytes)
        available = (min(wanted, half_of_memory(runner)) - state_bytes) // page_bytes
    if available < needed:
        available = max(available, 0)
        raise ValueError(
            f"max_model_len={setup.max_model_len} needs {needed} KV cache blocks of "
            f"{setup.block_size} tokens ({needed * page_bytes / 2**20:.0f} MiB), and there is room "
            f"for {available} ({available * setup.block_size} tokens): raise {source} or lower "
            "max_model_len"
        )
    return available


def half_of_memory(runner: ModelRunner) -> int:
    """Half of the host's memory, shared out among the ranks."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // runner.tp.size


def free_gpu_bytes(runner: ModelRunner) -> int:
    """Bytes left for the KV cache: our share - weights - the largest step - decode
    graphs.

    Our share is gpu_memory_utilization of the whole GPU, or all that other processes
    leave of it. All is measured as the driver sees it, so that kernels, library
    workspaces and fragmentation count.
    """
    device = runner.device
    total = torch.cuda.mem_get_info(device)[1]
    share = total * runner.setup.args.gpu_memory_utilization
    share = min(share, runner.free_at_start - GPU_RESERVE_BYTES)
    free_gpu_memory(device)  # gives back what loading no longer needs
    pages = profile_step(runner)
    torch.cuda.synchronize(device)
    used = runner.free_at_start - torch.cuda.mem_get_info(device)[0]
    used -= pages * runner.attention.page_bytes()
    graphs = graph_bytes(runner)
    runner.attention.allocate(0)
    free_gpu_memory(device)
    return int(share - used - graphs - adapter_bytes(runner))


def adapter_bytes(runner: ModelRunner) -> int:
    """Bytes of as many LoRA adapters as may be loaded."""
    if runner.lora is None:
        return 0
    return runner.lora.num_bytes() * runner.setup.args.num_adapters


Recorded = TypeVar("Recorded", DecodeGraphs, Pieces)


def graph_bytes(runner: ModelRunner) -> int:
    """Bytes of the decode graphs, and of the pieces of steps with prompts.

    What cannot be recorded now is not tried later, because nothing else uses the GPU's
    memory yet.
    """
    graphs = recorded_bytes(runner, record_graphs)
    if graphs is None:
        runner.capture_stream = None
        return 0
    pieces = recorded_bytes(runner, record_pieces)
    if pieces is None:
        runner.records_pieces = False
        return graphs
    return graphs + pieces


def recorded_bytes(
    runner: ModelRunner, record: Callable[[ModelRunner, int], Recorded | None]
) -> int | None:
    """Bytes of what `record` records: the largest size's, and a second one's for each other.

    None where nothing is recorded.
    """
    before = free_gpu_memory(runner.device)
    # Libraries take the memory that they then keep.
    if record(runner, 1) is None:
        return None
    free = []
    for count in (1, 2):
        recorded = record(runner, count)
        free.append(free_gpu_memory(runner.device))
        num_others = len(recorded.sizes) - 1 if recorded else 0
        del recorded
    return before - free[0] + num_others * max(free[0] - free[1], 0)


def record(runner: ModelRunner) -> None:
    """Records what steps on a GPU replay."""
    runner.graphs = record_graphs(runner)
    runner.pieces = record_pieces(runner)


@torch.inference_mode()
def record_graphs(runner: ModelRunner, count: int | None = None) -> DecodeGraphs | None:
    """Decode graphs of the `count` largest sizes (None: of all sizes).

    None where there are no graphs, or one cannot be recorded: another call may succeed, once
    there is more memory. Raises RuntimeError if the step itself fails and there are other
    ranks.
    """
    if runner.capture_stream is None:
        return None
    with kernel_choice(runner.kernel_choice):
        graphs = DecodeGraphs(runner.setup, runner.capture_stream)
    if not graphs.sizes:
        return None

    def record_size(size: int) -> None:
        graphs.record(size, runner.forward, lambda hidden, batch: head(runner, hidden, batch))

    is_recorded = record_sizes(runner, graphs, count, record_size, "decoding")
    return graphs if is_recorded else None


@torch.inference_mode()
def record_pieces(runner: ModelRunner, count: int | None = None) -> Pieces | None:
    """The pieces of steps with prompts, of the `count` largest sizes (None: of all sizes).

    As `record_graphs`.
    """
    if runner.capture_stream is None or not runner.records_pieces:
        return None
    pieces = Pieces(runner.setup, runner.attention, CudaRecorder(runner.capture_stream))

    def record_size(size: int) -> None:
        pieces.record(size, runner.forward)

    is_recorded = record_sizes(runner, pieces, count, record_size, "prefill")
    runner.model.attend_by(runner.attention)  # else the model keeps the recording alive
    return pieces if is_recorded else None


def record_sizes(
    runner: ModelRunner,
    recorded: DecodeGraphs | Pieces,
    count: int | None,
    record_size: Callable[[int], None],
    what: str,
) -> bool:
    """Whether the `count` largest sizes (None: all sizes) are recorded, on all ranks."""
    try:
        for size in recorded.sizes[::-1][:count]:
            failure = failure_of(runner, record_size, size)
            # All ranks replay or none does, because padding makes their collectives differ.
            if not runner.tp.minimum(not failure, runner.device):
                logger.warning(
                    "%s runs without CUDA graphs: recording a graph for %d %s failed: %s",
                    what,
                    size,
                    recorded.unit,
                    failure or "another rank failed",
                )
                recorded.clear()
                return False
    except BaseException:
        recorded.clear()  # the error's traceback holds the graphs
        raise
    free_gpu_memory(runner.device)  # what the first runs of the sizes have left in torch's cache
    return True


def failure_of(runner: ModelRunner, record_size: Callable[[int], None], size: int) -> str:
    """Records a size. Returns why that failed, or nothing.

    Raises RuntimeError if the step itself fails and there are other ranks, because they
    wait inside the collectives of this step.
    """
    try:
        choice = kernel_choice(runner.kernel_choice)
        with current(runner.device), choice, no_garbage_collection():
            record_size(size)
    except RuntimeError as error:
        if runner.tp.size > 1 and not isinstance(error, CaptureError):
            raise
        return str(error) or type(error).__name__
    return ""


def head(runner: ModelRunner, hidden: Tensor, batch: Batch[Tensor]) -> Tensor:
    return runner.next_tokens.sample(runner.model.logits(hidden), batch)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """An older engine's graphs that are collected during a recording would break it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@torch.inference_mode()
def profile_step(runner: ModelRunner) -> int:
    """Runs the largest possible batch, for its peak of memory. Returns the pages it used."""
    setup = runner.setup
    num_seqs = min(setup.max_num_seqs, setup.max_num_batched_tokens)
    length = min(ceil_div(setup.max_num_batched_tokens, num_seqs), setup.max_model_len)
    blocks = ceil_div(length, setup.block_size)
    runner.attention.allocate(blocks)
    batch = uniform_batch(num_seqs, length, blocks)
    vocab_size = setup.config.vocab_size
    batch.parts = sampling_parts(num_seqs, length, vocab_size, setup.args.max_logprobs)
    # Plain definitions take more memory than compiled ones, and a start takes less time
    # without compilations that no request may need.
    choice = runner.kernel_choice
    runner.kernel_choice = replace(choice, compiles=False)
    try:
        runner.launch(batch).collect()
    finally:
        runner.kernel_choice = choice
    return blocks


def uniform_batch(num_seqs: int, length: int, blocks: int) -> Batch[np.ndarray]:
    """Sequences of equal lengths that all write the same pages and sample."""
    each = np.arange(num_seqs, dtype=np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), num_seqs)
    zeros = np.zeros(num_seqs * length, np.int32)
    attention = AttentionMetadata(
        positions=positions,
        slot_mapping=positions,
        query_start=np.arange(num_seqs + 1, dtype=np.int32) * length,
        context_lens=np.full(num_seqs, length, np.int32),
        block_tables=np.tile(np.arange(blocks, dtype=np.int32), (num_seqs, 1)),
        max_query_len=length,
        num_prefills=num_seqs if length > 1 else 0,
        max_context_len=length,
    )
    sample = SampleRows(
        at=(each + 1) * length - 1,
        rows=each,
        temperature=np.ones(num_seqs, np.float32),
        uniform=np.zeros(num_seqs, np.float32),
    )
    return Batch(Tokens(zeros, zeros), attention, sample)


def sampling_parts(
    num_seqs: int, length: int, vocab_size: int, max_logprobs: int
) -> dict[str, Part[np.ndarray]]:
    """Filters, penalties and logprobs of all sequences, each of which has `length` tokens.

    max_logprobs: -1 allows the whole vocabulary, which is not what most requests ask for.
    """
    each = np.arange(num_seqs, dtype=np.int32)
    ones = np.ones(num_seqs, np.float32)
    filters = FiltersPart(
        at=each,
        top_k=np.full(num_seqs, vocab_size, np.int32),
        top_p=0.9 * ones,
        min_p=0 * ones,
    )
    penalties = PenaltiesPart(
        at=each,
        presence=0.1 * ones,
        frequency=0.1 * ones,
        repetition=1.1 * ones,
        history=np.zeros(num_seqs * length, np.int32),
        history_start=np.arange(num_seqs + 1, dtype=np.int32) * length,
        prompt_lens=np.ones(num_seqs, np.int32),
    )
    k = min(vocab_size, max_logprobs if max_logprobs > 0 else EngineArgs.max_logprobs)
    return {"filters": filters, "penalties": penalties, "logprobs": LogprobsPart(each, k)}
