"""Steps that hold prompts, recorded as CUDA graphs of the pieces between attentions.

A decode step is one graph (cuda_graphs.py). A step with a prompt cannot be one, because
the launches of attention depend on the lengths of its sequences. All other launches depend
on the number of tokens alone. So the Python model runs once for each of some numbers of
tokens, and every call of `attend` ends one graph and begins the next. A step replays the
graphs of its padded number of tokens, and between two of them the backend attends as it
does without graphs. This file knows neither the model nor the sampler.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend
from nanovllm.core.batch import AttentionMetadata, Batch, SampleRows, Tokens, ceil_div
from nanovllm.kernels.rope import Rope
from nanovllm.runner.cuda_graphs import (
    CaptureError,
    Work,
    free,
    graph_size,
    ready_to_capture,
    recording,
)
from nanovllm.runner.setup import Setup

# The numbers of tokens with graphs. Matrix products compute tiles of up to 128 rows, so
# padding to a multiple of 128 adds no tile. Launches take a small part of larger steps.
SIZES = (16, 32, 64, *range(128, 2049, 128))
INPUTS = ("token_ids", "token_rows", "positions", "slot_mapping")

Forward = Callable[[Batch[Tensor], AttentionBackend], Tensor]


def piece_sizes(max_num_tokens: int) -> list[int]:
    """The sizes for steps of at most `max_num_tokens` tokens."""
    largest = bisect_left(SIZES, max_num_tokens)
    return list(SIZES[: largest + 1])


@dataclass
class Cut:
    """One call of `attend` between two pieces."""

    layer: int
    q: Tensor  # [size, Hq, D], written by the piece before
    sinks: Tensor | None
    out: Tensor  # [size, Hq * Dv], zeroed by the piece before, and read by the next one


@dataclass
class RecordedStep:
    """The pieces of one size in their order. A cut follows each piece but the last.

    `hidden`, and q and out of the cuts, do not own their memory.
    """

    batch: Batch[Tensor]  # kept, because the first piece records the backend's `begin` of it
    pieces: list[Work]
    cuts: list[Cut]
    hidden: Tensor  # [size, hidden_size], written by the last piece


def alias(x: Tensor) -> Tensor:
    """The memory of x as a tensor that does not keep it from being used again.

    Pieces that run later may use the memory of x for other results, as they did while they
    were recorded. A tensor that owned the memory would prevent this.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    num_bytes = extent * x.itemsize
    storage = torch._C._construct_storage_from_data_pointer(x.data_ptr(), x.device, num_bytes)
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, 0, x.shape, x.stride())


class Recorder(Protocol):
    """Records pieces of one model."""

    def ready(self, work: Work, largest: bool) -> AbstractContextManager[None]:
        """Runs `work` once. Inside the `with` pieces can be recorded.

        largest: whether these are the first pieces of all, and of the largest size.
        """

    def piece(self) -> AbstractContextManager[Work]:
        """Records what runs inside the `with`. Gives the function that replays it.

        Raises CaptureError for what cannot be recorded.
        """


class CudaRecorder:
    """Records pieces as CUDA graphs, which share one pool of memory."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.pool = torch.cuda.graph_pool_handle()

    def ready(self, work: Work, largest: bool) -> AbstractContextManager[None]:
        return ready_to_capture(self.stream, work, largest)

    @contextmanager
    def piece(self) -> Iterator[Work]:
        graph = torch.cuda.CUDAGraph()
        with recording(graph, self.stream, self.pool):
            yield graph.replay


class CutAttention(AttentionBackend):
    """Stands for the backend while a step is recorded. Each `attend` cuts the step.

    It attends to nothing: the result is zeros, and a replay puts the true result there.
    """

    def __init__(self, backend: AttentionBackend, cut: Callable[[Cut], None]) -> None:
        super().__init__(backend.spec)
        self.backend = backend
        self.cut = cut

    def allocate(self, num_blocks: int) -> None:
        self.backend.allocate(num_blocks)

    def begin(self, meta: AttentionMetadata[Tensor]) -> None:
        super().begin(meta)
        self.backend.begin(meta)

    def write(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        return self.backend.write(layer, qkv, rope)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.backend.store(layer, k, v)

    def attend(self, layer: int, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        # A replay writes the rows of the step's tokens. Zeros in the rows of padding keep
        # all later numbers finite.
        out = q.new_zeros(len(q), q.shape[1] * self.spec.layers[layer].value_size)
        self.cut(Cut(layer, q, sinks, out))
        return out


class StepRecording:
    """The pieces of a step that is being recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.pieces: list[Work] = []
        self.cuts: list[Cut] = []
        self.open = ExitStack()  # holds the piece that is being recorded

    def begin_piece(self) -> None:
        self.pieces.append(self.open.enter_context(self.recorder.piece()))

    def cut(self, cut: Cut) -> None:
        self.open.close()
        self.cuts.append(replace(cut, q=alias(cut.q), out=alias(cut.out)))
        self.begin_piece()

    def free(self) -> None:
        """Frees the pieces before the one that failed, whose recording may not have ended."""
        for piece in self.pieces[:-1]:
            free(piece)


class Pieces:
    """The recorded pieces for each size, and their inputs, which stay at one place.

    Invariant: the memory that a piece reads and writes never moves.
    """

    unit = "tokens"  # what `sizes` count

    def __init__(self, setup: Setup, attention: AttentionBackend, recorder: Recorder) -> None:
        self.attention = attention
        self.recorder = recorder
        self.device = setup.device
        self.block_size = setup.block_size
        self.sizes = piece_sizes(setup.max_num_batched_tokens)
        # Rows of padding read token 0 at position 0, and write nowhere.
        self.padding = np.array([[0], [setup.max_num_seqs], [0], [-1]], np.int32)
        length = len(INPUTS) * self.sizes[-1]
        self.inputs = torch.empty(length, dtype=torch.int32, device=setup.device)
        self.steps: dict[int, RecordedStep] = {}

    def inputs_of(self, size: int) -> Tensor:
        """[INPUTS, size]: the inputs of the pieces of one size. All sizes share the memory."""
        return self.inputs[: len(INPUTS) * size].view(len(INPUTS), size)

    def static_batch(self, size: int) -> Batch[Tensor]:
        """A step of one sequence of `size` tokens. Its four inputs are views of `inputs`."""
        token_ids, token_rows, positions, slot_mapping = self.inputs_of(size)

        def numbers(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        attention = AttentionMetadata(
            positions=positions,
            slot_mapping=slot_mapping,
            query_start=numbers(0, size),
            context_lens=numbers(size),
            block_tables=numbers(*[0] * ceil_div(size, self.block_size))[None],
            max_query_len=size,
            num_prefills=1,
            max_context_len=size,
        )
        nothing = numbers()
        sample = SampleRows(nothing, nothing, nothing.float(), nothing.float())
        return Batch(Tokens(token_ids, token_rows), attention, sample)

    def record(self, size: int, forward: Forward) -> None:
        """Records the pieces of a size. The largest size is recorded first.

        forward: (batch, attention) -> the last layer's output [size, hidden_size].
        """
        is_largest = not self.steps
        first, second = (self.static_batch(size) for _ in range(2))
        self.inputs_of(size).copy_(torch.from_numpy(self.padding))
        layers: list[int] = []  # that attend, in their order
        uncut = CutAttention(self.attention, lambda cut: layers.append(cut.layer))
        step = StepRecording(self.recorder)
        attention = CutAttention(self.attention, step.cut)
        try:
            with self.recorder.ready(lambda: forward(first, uncut), is_largest), step.open:
                step.begin_piece()
                hidden = forward(second, attention)
            found = [cut.layer for cut in step.cuts]
            if found != layers:  # the model's own code has caught an error
                raise CaptureError(f"layers {found} attended instead of {layers}")
        except BaseException:
            step.free()  # the error's traceback holds the graphs
            raise
        self.steps[size] = RecordedStep(second, step.pieces, step.cuts, alias(hidden))

    def can_run(self, batch: Batch[np.ndarray]) -> bool:
        """Whether there are pieces for this batch. They have no products of LoRA."""
        return "lora" not in batch.parts and len(batch.tokens.ids) <= self.sizes[-1]

    def forward(self, host_batch: Batch[np.ndarray], batch: Batch[Tensor]) -> Tensor:
        """The last layer's output [T, hidden_size], valid until the next step.

        batch: the same batch on the device.
        """
        count = len(host_batch.tokens.ids)
        size = graph_size(count, self.sizes)
        step = self.steps[size]
        self.send(host_batch, size)
        self.attention.begin(batch.attention)
        for piece, cut in zip(step.pieces, step.cuts):
            piece()
            cut.out[:count] = self.attention.attend(cut.layer, cut.q[:count], cut.sinks)
        step.pieces[-1]()
        return step.hidden[:count]

    def send(self, batch: Batch[np.ndarray], size: int) -> None:
        """Puts a batch into the inputs of a size: one copy to the device."""
        is_gpu = self.device.type == "cuda"
        # Torch uses a pinned block again only after the copies from the block are done.
        staging = torch.empty(len(INPUTS), size, dtype=torch.int32, pin_memory=is_gpu)
        rows = staging.numpy()
        rows[:] = self.padding
        tokens, attention = batch.tokens, batch.attention
        columns = (tokens.ids, tokens.rows, attention.positions, attention.slot_mapping)
        for row, column in zip(rows, columns):
            row[: len(column)] = column
        self.inputs_of(size).copy_(staging, non_blocking=True)

    def clear(self) -> None:
        """Frees all graphs."""
        for step in self.steps.values():
            for piece in step.pieces:
                free(piece)
        self.steps.clear()
