"""A scheduler and a block manager that note what the plain classes do.

They decide nothing: each method calls the plain one. Knows no text and no files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from nanovllm.core.sequence import Prefix, Sequence
from nanovllm.core.step import Step
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.trace.records import Admission, BlockEvent

EventName = Literal["acquire", "allocate", "register", "evict", "release", "free"]


class FindablePrefixes(dict[int, Prefix]):
    """`BlockManager.cached`: calls `note` when a block begins or ceases to be findable."""

    def __init__(self, note: Callable[[EventName, Prefix], None]) -> None:
        super().__init__()
        self.note = note

    def __setitem__(self, digest: int, prefix: Prefix) -> None:
        replaced = self.get(digest)
        if replaced is not None:
            self.note("evict", replaced)
        super().__setitem__(digest, prefix)
        self.note("register", prefix)

    def __delitem__(self, digest: int) -> None:
        self.note("evict", self[digest])
        super().__delitem__(digest)


class TracedBlockManager(BlockManager):
    """`events` grows by each thing that happens to a block.

    `seq` is the sequence on whose behalf the next call is, and `position` that of the
    first token in the blocks that the next `allocate` returns.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.events: list[BlockEvent] = []
        self.seq: int | None = None
        self.position = 0
        self.starts: dict[int, int] = {}  # block -> position of its first token
        self.cached = FindablePrefixes(self._note_prefix)

    def _note_prefix(self, event: EventName, prefix: Prefix) -> None:
        self._note(event, prefix.block_id, prefix, self.ref_counts[prefix.block_id])

    def _note(self, event: EventName, block_id: int, prefix: Prefix | None, refs: int) -> None:
        parent = None if prefix is None else prefix.parent
        if parent is not None and self.prefixes[parent.block_id] is not parent:
            parent = None  # the parent's block has other contents by now
        self.events.append(
            {
                "event": event,
                "block": block_id,
                "refs": refs,
                "seq": self.seq,
                "hash": None if prefix is None else f"{prefix.hash:016x}",
                "parent": None if parent is None else parent.block_id,
                "start": self.starts.get(block_id),
            }
        )

    def acquire(self, chain: list[Prefix]) -> list[int]:
        block_ids = super().acquire(chain)
        for prefix in chain:
            self._note_prefix("acquire", prefix)
        return block_ids

    def allocate(self, count: int) -> list[int]:
        block_ids = super().allocate(count)
        for i, block_id in enumerate(block_ids):
            self.starts[block_id] = self.position + i * self.block_size
            self._note("allocate", block_id, None, 1)
        return block_ids

    def release(self, block_ids: list[int], keep: bool = True) -> None:
        for block_id in reversed(block_ids):
            refs = self.ref_counts[block_id] - 1
            self._note("release" if refs else "free", block_id, self.prefixes[block_id], refs)
            super().release([block_id], keep)


@dataclass
class Changes:
    """What happened in a scheduler since the last step, besides its block events."""

    admitted: list[Admission] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)


@dataclass
class SampledToken:
    """A token that has become a part of its sequence."""

    seq_id: int
    position: int
    token: int


class TracedScheduler(Scheduler):
    """`changes` and `blocks.events` grow until the recorder takes them.

    `step` is the last step that `schedule` returned, `began` and `planned` are the times
    before and after. `sampled` holds the tokens of the last `update`.
    """

    blocks: TracedBlockManager

    def __init__(self, **arguments: object) -> None:
        """arguments: of Scheduler."""
        super().__init__(**arguments)  # type: ignore[arg-type]
        self.blocks = TracedBlockManager(self.blocks.num_blocks, self.block_size)
        self.changes = Changes()
        self.step: Step | None = None
        self.began = 0.0
        self.planned = 0.0
        self.sampled: list[SampledToken] = []

    def schedule(self) -> Step | None:
        self.step = None
        self.began = time.perf_counter()
        self.step = super().schedule()
        self.planned = time.perf_counter()
        return self.step

    def _admit(self, seq: Sequence, budget: int) -> int | None:
        self.blocks.seq = seq.seq_id
        row = super()._admit(seq, budget)
        if row is not None:
            cached = int(self.table.num_computed[row])
            hit = self.table.blocks_of(row)
            self.changes.admitted.append({"seq": seq.seq_id, "cached": cached, "hit": hit})
        return row

    def _allocate(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Row by row, so that each event of a block names its sequence."""
        for at in range(len(rows)):
            one = slice(at, at + 1)
            row = int(rows[at])
            self.blocks.seq = int(self.table.seq_id[row])
            self.blocks.position = int(self.table.num_blocks[row]) * self.block_size
            super()._allocate(rows[one], counts[one])

    def _register(self, row: int, num_full: int) -> None:
        self.blocks.seq = int(self.table.seq_id[row])
        super()._register(row, num_full)

    def _preempt(self, seq: Sequence) -> None:
        self.changes.preempted.append(seq.seq_id)
        super()._preempt(seq)

    def _release(self, seq: Sequence) -> None:
        self.blocks.seq = seq.seq_id
        super()._release(seq)

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        super().finish(seq, reason, stop_reason)
        self.changes.finished.append(seq)

    def update(self, step: Step, tokens: np.ndarray) -> list[tuple[int, Sequence]]:
        sampled = zip(step.seq_ids.tolist(), step.ends[step.sampled].tolist(), tokens.tolist())
        self.sampled = [SampledToken(*each) for each in sampled if each[0] in self.unfinished]
        return super().update(step, tokens)

    def reset_prefix_cache(self) -> None:
        self.blocks.seq = None
        super().reset_prefix_cache()

    def take_changes(self) -> tuple[Changes, list[BlockEvent]]:
        """What happened since the last call."""
        changes = self.changes
        events = self.blocks.events
        self.changes = Changes()
        self.blocks.events = []
        return changes, events
