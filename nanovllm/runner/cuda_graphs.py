"""Decode steps recorded as CUDA graphs: some hundred kernel launches become two.

A graph repeats the same kernels on the same memory. So a few batch sizes have graphs of their own, a batch is padded to the
next of them, and its arrays stay where the graphs read (decode_inputs.py). This file knows neither the model nor the
sampler: it records functions of a `Batch`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.batch import Batch
from nanovllm.runner.decode_inputs import DecodeInputs

Work = Callable[[], Any]

NEVER_ENDED: list[torch.cuda.CUDAGraph] = []  # torch's allocators still ask these whether they are being captured


class CaptureError(RuntimeError):
    """What ran well by itself could not be recorded."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes that have graphs: 1, 2, 4, 8, then steps of 16, and at last max_num_seqs itself."""
    return [size for size in (1, 2, 4, 8, *range(16, max_num_seqs, 16)) if size < max_num_seqs] + [max_num_seqs]


def graph_size(count: int, sizes: list[int]) -> int:
    """The smallest size that holds `count` sequences."""
    return sizes[bisect_left(sizes, count)]


def is_decode(batch: Batch) -> bool:
    """Whether every sequence computes one token and gets the next."""
    return bool(batch.sizes[0] == 1) and len(batch.sample_at) == len(batch.context_lens) and not len(batch.prompt_at)


def is_plain(batch: Batch) -> bool:
    """Whether the tokens depend on logits and temperatures alone, and no logprobs are wanted."""
    return not any(map(len, (batch.filter_at, batch.allow_at, batch.bias_at, batch.penalty_at, batch.logprob_at)))


def capture(stream: torch.cuda.Stream, pool: Any, work: Work, largest: bool) -> Work:
    """Records `work` as a graph and returns what replays it. The `largest` size comes first and makes the pool grow.

    If that fails, raises CaptureError with streams, allocator and random generator as they were.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[stream.device_index]
    torch.cuda.synchronize(stream.device)
    with torch.cuda.stream(stream):
        work()  # once before: kernels are compiled, libraries take the memory that they keep
        stream.synchronize()
        # A graph's workspace must lie in its pool: the library's own may be freed, by torch.compile for one.
        torch._C._cuda_clearCublasWorkspaces()
        if largest:
            torch.cuda.empty_cache()  # while it records, torch would rather fail than give back what it keeps
        state = generator.clone_state()
        try:
            # torch.cuda.graph would stay on this stream after a failure, and collects garbage before each graph.
            with torch.inference_mode(False):  # in torch 2.8 the generator keeps tensors that are made here
                graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        except RuntimeError as err:
            generator.graphsafe_set_state(state)  # its own still believes that it is being captured
            with suppress(RuntimeError):  # raised where capture_end came as far as this itself
                torch._C._cuda_endAllocateToPool(stream.device_index, pool)
                torch._C._cuda_releasePool(stream.device_index, pool)
                NEVER_ENDED.append(graph)
            raise CaptureError(str(err) or type(err).__name__) from err
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


class DecodeGraphs:
    """Two graphs a size: one leaves the last layer's output in `hidden`, the other makes `tokens` of it.

    A batch whose sampling takes more than temperatures replays the first and goes on eagerly. Invariant: all that a graph
    reads or writes stays where it was when the graph was recorded.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.sizes = graph_sizes(max_num_seqs)
        self.shape = max_num_seqs, max_blocks
        flat = torch.empty(DecodeInputs.size(*self.shape), dtype=torch.int32, device=device)
        self.inputs = DecodeInputs(flat, *self.shape, torch.float32)
        self.inputs.clear()
        self.host: DecodeInputs | None = None  # the same on the host; None where it is not known what the device has
        self.each = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(max_num_seqs, hidden_size, dtype=dtype, device=device)
        self.tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.graphs: dict[int, tuple[Work, Work]] = {}
        self.capture: Callable[[Work, bool], Work] = lambda work, largest: work  # a device without graphs just runs it
        if stream is not None:
            self.capture = partial(capture, stream, torch.cuda.graph_pool_handle())

    def record(self, size: int, forward: Callable[[Batch], Tensor], head: Callable[[Tensor, Batch], Tensor]) -> None:
        """forward(batch) -> hidden states [size, hidden_size], head(hidden states, batch) -> tokens [size]."""
        columns = {name: column[:size] for name, column in self.inputs.columns.items() if name != "step"}
        batch = Batch(
            sizes=self.each[:0],  # never read
            query_start=self.each[: size + 1],
            block_tables=self.inputs.tables[:size],
            sample_at=self.each[:size],
            sample_rows=columns["token_rows"],
            **columns,
        )
        hidden, tokens = self.hidden[:size], self.tokens[:size]

        def step() -> None:
            hidden.copy_(forward(batch))
            self.inputs.advance(size)

        largest = not self.graphs
        self.graphs[size] = (
            self.capture(step, largest),
            self.capture(lambda: tokens.copy_(head(hidden, batch)), largest),
        )

    def _forward(self, batch: Batch) -> Work:
        """Replays the first graph of the batch's size, and returns the other."""
        size = graph_size(len(batch.context_lens), self.sizes)
        forward, head = self.graphs[size]
        host, self.host = self.host, None  # whatever ends this half-way: all is sent the next time
        if host is None:
            host = DecodeInputs(np.empty(len(self.inputs.flat), np.int32), *self.shape, np.float32)
            host.clear()
            self.inputs.clear()
        places, values = host.update(batch, size)
        if count := len(places):
            # Torch keeps pinned blocks, and uses one again once the copies out of it are done.
            staging = torch.empty(3 * count, dtype=torch.int32, pin_memory=self.hidden.is_cuda)
            packed = staging.numpy()
            packed[: 2 * count].view(np.int64)[:], packed[2 * count :] = places, values
            changes = staging.to(self.hidden.device, non_blocking=True)
            self.inputs.flat[changes[: 2 * count].view(torch.int64)] = changes[2 * count :]
        forward()
        host.advance(size)
        self.host = host
        return head

    def hidden_states(self, batch: Batch) -> Tensor:
        """The last layer's output [S, hidden_size] of a decode batch; it holds until the next step."""
        self._forward(batch)
        return self.hidden[: len(batch.context_lens)]

    def next_tokens(self, batch: Batch) -> Tensor:
        """The tokens [S] int64 of a plain decode batch; they hold until the next step."""
        self._forward(batch)()
        return self.tokens[: len(batch.context_lens)]
