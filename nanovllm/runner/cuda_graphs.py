"""Decode steps recorded as CUDA graphs, which replace hundreds of kernel launches by two.

A graph repeats the same kernels on the same memory (decode_inputs.py). Only some batch
sizes have graphs, and a batch is padded to the next size. This file records functions of
a `Batch`. It knows neither the model nor the sampler.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from nanovllm.compilation import Compilation
from nanovllm.core.batch import AttentionMetadata, Batch, SampleRows, Tokens, ceil_div
from nanovllm.runner.decode_inputs import DecodeInputs
from nanovllm.runner.setup import Setup
from nanovllm.sampling.filters import FiltersPart, can_record_filters

Work = Callable[[], object]

# Graphs whose capture could not be ended. They must stay alive, because torch's allocator
# still asks them whether they are being captured.
NEVER_ENDED: list[torch.cuda.CUDAGraph] = []


class CaptureError(RuntimeError):
    """A step runs, and cannot be recorded."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes with graphs: 1, 2, 4, 8, steps of 16 to 256, steps of 32, max_num_seqs."""
    sizes = [1, 2, 4, 8, *range(16, 256, 16), *range(256, max_num_seqs, 32)]
    smaller = [size for size in sizes if size < max_num_seqs]
    return [*smaller, max_num_seqs]


def recorded_sizes(max_num_seqs: int, compilation: Compilation) -> list[int]:
    """The batch sizes with graphs: the sizes that the user asks for, or `graph_sizes`."""
    asked = compilation.capture_sizes or graph_sizes(max_num_seqs)
    largest = min(compilation.max_capture_size or max_num_seqs, max_num_seqs)
    return sorted({min(size, largest) for size in asked})


def graph_size(count: int, sizes: list[int]) -> int:
    """The smallest size of at least `count` sequences."""
    return sizes[bisect_left(sizes, count)]


def is_decode(batch: Batch[np.ndarray]) -> bool:
    """Whether every sequence computes one token and samples the next.

    Graphs have no products of LoRA.
    """
    if "prompt_logprobs" in batch.parts or "lora" in batch.parts:
        return False
    num_seqs = len(batch.attention.context_lens)
    num_sampled = len(batch.sample.at)
    return batch.attention.max_query_len == 1 and num_sampled == num_seqs


def capture(
    stream: torch.cuda.Stream, pool: torch.cuda._POOL_HANDLE, work: Work, largest: bool
) -> Work:
    """Records `work` as a graph. Returns the function that replays the graph.

    largest: whether this is the first graph of the pool, for the largest batch size.
    Raises CaptureError if the recording fails. Streams, allocator and random generator
    are then as before.
    """
    graph = torch.cuda.CUDAGraph()
    with ready_to_capture(stream, work, largest), recording(graph, stream, pool):
        work()
    return graph.replay


@contextmanager
def ready_to_capture(stream: torch.cuda.Stream, work: Work, largest: bool) -> Iterator[None]:
    """Runs `work` once. Inside the `with` what it did can be captured on `stream`."""
    torch.cuda.synchronize(stream.device)
    with torch.cuda.stream(stream):
        # A first run compiles kernels and lets libraries allocate their memory.
        work()
        stream.synchronize()
        # cuBLAS must allocate a workspace in the graph's pool, because torch may free the
        # old one.
        torch._C._cuda_clearCublasWorkspaces()
        if largest:
            # Cached memory is freed now, because torch cannot free it in a capture.
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: torch.cuda._POOL_HANDLE
) -> Iterator[None]:
    """Captures what runs inside the `with` on the current stream.

    Raises CaptureError after undoing a failed capture. torch.cuda.graph is not used,
    because it collects garbage before each graph, and because its stream stays the current
    one after a failure.
    """
    generator = torch.cuda.default_generators[stream.device_index]
    state = generator.clone_state()
    try:
        # In torch 2.8 the generator keeps tensors that are made here, so these must not
        # be inference tensors.
        with torch.inference_mode(False):
            graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
    except RuntimeError as err:
        # The old state, because the new one still counts as being captured.
        generator.graphsafe_set_state(state)
        # These raise RuntimeError if capture_end has already done the same.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            torch._C._cuda_releasePool(stream.device_index, pool)
            NEVER_ENDED.append(graph)
        raise CaptureError(str(err) or type(err).__name__) from err


def free(replay: Work) -> None:
    """Frees a recorded graph, even where something still holds `replay`.

    An exception's traceback may hold it, and NCCL waits for the graphs of its collectives.
    """
    graph: object = getattr(replay, "__self__", None)
    if hasattr(graph, "reset"):
        graph.reset()


class DecodeGraphs:
    """Two graphs for each size: the model's, which writes `hidden`, and the sampler's.

    The sampler's graph reads temperatures, and the optional parts named in `parts`. A batch
    with other parts replays the model's graph and samples eagerly.
    Invariant: the memory that a graph reads and writes never moves.
    """

    unit = "sequences"  # what `sizes` count

    def __init__(self, setup: Setup, stream: torch.cuda.Stream | None = None) -> None:
        """stream: for the capture. None runs the functions without graphs."""
        max_num_seqs = setup.max_num_seqs
        device = setup.device
        self.max_model_len = setup.max_model_len
        self.sizes = recorded_sizes(max_num_seqs, setup.compilation)
        self.shape = (max_num_seqs, ceil_div(setup.max_model_len, setup.block_size))
        size = DecodeInputs.size(*self.shape)
        flat = torch.empty(size, dtype=torch.int32, device=device)
        self.inputs = DecodeInputs(flat, *self.shape, torch.float32)
        self.inputs.clear()
        # The host's copy of `inputs`. None if the contents on the device are unknown.
        self.host: DecodeInputs[np.ndarray] | None = None
        self.numbers = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        hidden_shape = (max_num_seqs, setup.config.hidden_size)
        self.hidden = torch.zeros(hidden_shape, dtype=setup.dtype, device=device)
        self.tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.parts = {"filters"} if can_record_filters(self.hidden) else set()
        self.graphs: dict[int, tuple[Work, Work]] = {}
        self.capture: Callable[[Work, bool], Work] = lambda work, largest: work
        if stream is not None:
            self.capture = partial(capture, stream, torch.cuda.graph_pool_handle())

    def has_graph(self, batch: Batch[np.ndarray]) -> bool:
        """Whether the batch is a decode step of at most the largest size."""
        return is_decode(batch) and len(batch.attention.context_lens) <= self.sizes[-1]

    def static_batch(self, size: int) -> Batch[Tensor]:
        """A batch of `size` sequences. Its arrays are views of `inputs`."""
        columns = {}
        for name, column in self.inputs.columns.items():
            columns[name] = cast(Tensor, column[:size])
        attention = AttentionMetadata(
            positions=columns["positions"],
            slot_mapping=columns["slot_mapping"],
            query_start=self.numbers[: size + 1],
            context_lens=columns["context_lens"],
            block_tables=cast(Tensor, self.inputs.tables[:size]),
            max_query_len=1,
            num_prefills=0,
            max_context_len=self.max_model_len,
        )
        rows = columns["token_rows"]
        tokens = Tokens(columns["token_ids"], rows)
        sample = SampleRows(
            at=self.numbers[:size],
            rows=rows,
            temperature=columns["temperature"],
            uniform=columns["uniform"],
        )
        batch = Batch(tokens, attention, sample)
        if "filters" in self.parts:
            batch.parts["filters"] = FiltersPart(
                at=self.numbers[:size],
                top_k=columns["top_k"],
                top_p=columns["top_p"],
                min_p=columns["min_p"],
            )
        return batch

    def record(
        self,
        size: int,
        forward: Callable[[Batch[Tensor]], Tensor],
        head: Callable[[Tensor, Batch[Tensor]], Tensor],
    ) -> None:
        """Records the two graphs of a size.

        forward: batch -> the last layer's output [size, hidden_size].
        head: (that output, batch) -> tokens [size]. The largest size is recorded first.
        """
        batch = self.static_batch(size)
        hidden = self.hidden[:size]
        tokens = self.tokens[:size]

        def step() -> None:
            hidden.copy_(forward(batch))
            self.inputs.advance(size)

        def sample() -> None:
            tokens.copy_(head(hidden, batch))

        is_largest = not self.graphs
        try:
            forward_graph = self.capture(step, is_largest)
        except CaptureError:
            sample()  # ranks that have recorded `step` wait in the collectives of `sample`
            raise
        try:
            sample_graph = self.capture(sample, is_largest)
        except BaseException:
            free(forward_graph)
            raise
        self.graphs[size] = (forward_graph, sample_graph)

    def clear(self) -> None:
        """Frees all graphs."""
        for replays in self.graphs.values():
            for replay in replays:
                free(replay)
        self.graphs.clear()

    def _forward(self, batch: Batch[np.ndarray]) -> Work:
        """Replays the model's graph of the batch's size. Returns the sampler's."""
        size = graph_size(len(batch.attention.context_lens), self.sizes)
        forward, sample = self.graphs[size]
        host = self.host
        self.host = None  # so that the next step sends all inputs after an error in this one
        if host is None:
            flat = np.empty(len(self.inputs.flat), np.int32)
            host = DecodeInputs(flat, *self.shape, np.float32)
            host.clear()
            self.inputs.clear()
        places, values = host.update(batch, size)
        if len(places):
            self._send(places, values)
        forward()
        host.advance(size)
        self.host = host
        return sample

    def _send(self, places: np.ndarray, values: np.ndarray) -> None:
        """Writes values [n] int32 to places [n] of `inputs`: one copy, one scatter."""
        count = len(places)
        split = 2 * count  # a place is an int64, hence two words
        # Torch reuses a pinned block only after the copies from the block are done.
        is_gpu = self.hidden.is_cuda
        staging = torch.empty(split + count, dtype=torch.int32, pin_memory=is_gpu)
        packed = staging.numpy()
        packed[:split].view(np.int64)[:] = places
        packed[split:] = values
        changes = staging.to(self.hidden.device, non_blocking=True)
        indices = changes[:split].view(torch.int64)
        self.inputs.flat.scatter_(0, indices, changes[split:])

    def can_sample(self, batch: Batch[np.ndarray]) -> bool:
        """Whether the sampler's graph reads all optional parts of the batch."""
        return batch.parts.keys() <= self.parts

    def hidden_states(self, batch: Batch[np.ndarray]) -> Tensor:
        """The last layer's output [S, hidden_size], valid until the next step."""
        self._forward(batch)
        return self.hidden[: len(batch.attention.context_lens)]

    def next_tokens(self, batch: Batch[np.ndarray]) -> Tensor:
        """The tokens [S] int64 of a batch that `can_sample`, valid until the next step."""
        sample = self._forward(batch)
        sample()
        return self.tokens[: len(batch.attention.context_lens)]
