"""Decode steps recorded as CUDA graphs: some hundred kernel launches become two.

A graph repeats the same kernels on the same memory. So a few batch sizes have graphs of their own, a batch is padded to the
next of them, and its arrays are copied to where the graphs read. This file knows neither the model nor the sampler: it
records functions of a `Batch`.
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

Work = Callable[[], Any]

INPUTS = ("token_ids", "positions", "slot_mapping", "token_rows", "context_lens", "temperature", "uniform")
NEVER_ENDED: list[torch.cuda.CUDAGraph] = []  # torch's allocator still asks these whether they are being captured


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


def pad_batch(batch: Batch, size: int, spare_row: int) -> Batch:
    """A decode batch with sequences added up to `size` that read one token of page 0 and write nowhere.

    Greedy rows become draws at temperature 0. Filters, edits and logprobs are left out.
    """
    count = len(batch.context_lens)

    def padded(values: np.ndarray, filler: int) -> np.ndarray:
        return np.concatenate((values, np.full((size - count, *values.shape[1:]), filler, values.dtype)))

    each = np.arange(size + 1, dtype=np.int32)
    rows = padded(batch.token_rows, spare_row)
    temperature, uniform = np.zeros((2, size), np.float32)
    temperature[batch.random_at], uniform[batch.random_at] = batch.temperature, batch.uniform
    return Batch(
        sizes=batch.sizes,
        token_ids=padded(batch.token_ids, 0),
        positions=padded(batch.positions, 0),
        slot_mapping=padded(batch.slot_mapping, -1),
        token_rows=rows,
        query_start=each,
        context_lens=padded(batch.context_lens, 1),
        block_tables=padded(batch.block_tables, 0),
        sample_at=each[:-1],
        sample_rows=rows,
        random_at=each[:-1],
        temperature=temperature,
        uniform=uniform,
    )


def capture(stream: torch.cuda.Stream, pool: Any, work: Work) -> Work:
    """Records `work` as a graph and returns what replays it.

    If that fails, raises RuntimeError with streams, allocator and random generator as they were.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[stream.device_index]
    torch.cuda.synchronize(stream.device)
    with torch.cuda.stream(stream):
        work()  # once before: kernels are compiled, libraries take the memory that they keep
        stream.synchronize()
        torch.cuda.empty_cache()  # while it records, torch would rather fail than give back what it keeps
        state = generator.clone_state()
        try:
            # torch.cuda.graph would stay on this stream after a failure, and collects garbage before each graph.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        except RuntimeError:
            generator.graphsafe_set_state(state)  # its own still believes that it is being captured
            with suppress(RuntimeError):  # raised where capture_end came as far as this itself
                torch._C._cuda_endAllocateToPool(stream.device_index, pool)
                torch._C._cuda_releasePool(stream.device_index, pool)
                NEVER_ENDED.append(graph)
            raise
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
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.sizes = graph_sizes(max_num_seqs)
        self.spare_row = max_num_seqs
        self.pitch = -(-max_num_seqs // 4) * 4  # every array begins at a multiple of 16 bytes, or kernels compile anew
        self.inputs = zeros(len(INPUTS) * self.pitch + max_num_seqs * max_blocks)
        self.rows = dict(zip(INPUTS, self.inputs[: len(INPUTS) * self.pitch].view(-1, self.pitch)))
        for name in ("temperature", "uniform"):
            self.rows[name] = self.rows[name].view(torch.float32)
        for name, filler in (("slot_mapping", -1), ("token_rows", self.spare_row), ("context_lens", 1)):
            self.rows[name].fill_(filler)
        self.tables = zeros(max_num_seqs, max_blocks)
        self.each = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self.hidden = zeros(max_num_seqs, hidden_size, dtype=dtype)
        self.tokens = zeros(max_num_seqs, dtype=torch.int64)
        self.graphs: dict[int, tuple[Work, Work]] = {}
        self.capture: Callable[[Work], Work] = lambda work: work  # a device without graphs runs what it is given
        if stream is not None:
            self.capture = partial(capture, stream, torch.cuda.graph_pool_handle())

    def record(self, size: int, forward: Callable[[Batch], Tensor], head: Callable[[Tensor, Batch], Tensor]) -> None:
        """forward(batch) -> hidden states [size, hidden_size], head(hidden states, batch) -> tokens [size]."""
        rows = {name: row[:size] for name, row in self.rows.items()}
        batch = Batch(
            sizes=self.each[:0],  # never read
            query_start=self.each[: size + 1],
            block_tables=self.tables[:size],
            sample_at=self.each[:size],
            sample_rows=rows["token_rows"],
            random_at=self.each[:size],
            **rows,
        )
        hidden, tokens = self.hidden[:size], self.tokens[:size]
        self.graphs[size] = (
            self.capture(lambda: hidden.copy_(forward(batch))),
            self.capture(lambda: tokens.copy_(head(hidden, batch))),
        )

    def _load(self, batch: Batch) -> tuple[Work, Work]:
        """Copies a batch to where the graphs of its size read, and returns these."""
        size = graph_size(len(batch.context_lens), self.sizes)
        padded = pad_batch(batch, size, self.spare_row)
        width, start = padded.block_tables.shape[1], len(INPUTS) * self.pitch
        used = start + size * width
        # Torch keeps pinned blocks, and uses one again once the copies out of it are done; of one size, no more are made.
        staging = torch.empty(len(self.inputs), dtype=torch.int32, pin_memory=self.inputs.is_cuda)
        packed = staging.numpy()
        for row, name in zip(packed[:start].reshape(-1, self.pitch), INPUTS):
            row[:size] = getattr(padded, name).view(np.int32)
        packed[start:used] = padded.block_tables.reshape(-1)
        self.inputs[:used].copy_(staging[:used], non_blocking=True)
        self.tables[:size, :width] = self.inputs[start:used].view(size, width)
        return self.graphs[size]

    def hidden_states(self, batch: Batch) -> Tensor:
        """The last layer's output [S, hidden_size] of a decode batch; it holds until the next step."""
        forward, _ = self._load(batch)
        forward()
        return self.hidden[: len(batch.context_lens)]

    def next_tokens(self, batch: Batch) -> Tensor:
        """The tokens [S] int64 of a plain decode batch; they hold until the next step."""
        forward, head = self._load(batch)
        forward()
        head()
        return self.tokens[: len(batch.context_lens)]
