"""Decides which sequences run in a step and how many tokens of each, and applies what was
sampled.

There is no prefill mode and no decode mode. A sequence has tokens it knows (`num_tokens`)
and tokens whose K/V is in the cache (`num_computed`). A step computes some of the
difference within one token budget. A prefill is a large difference, a decode a difference
of one, a chunk a part of a difference. The scheduler knows no torch and no text.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nanovllm.core.batch import ceil_div
from nanovllm.core.sequence import PENDING, Failure, Sequence, SequenceTable
from nanovllm.core.step import Step
from nanovllm.engine.adapters import Adapters
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.stats import EngineStats

ADMISSION_STEPS = 8  # the most steps from one admission to the next, where sequences wait


@dataclass
class Passed:
    """The head of the waiting queue while it waits for an adapter to end.

    Sequences up to seq_id `newest` may run before it.
    """

    head: Sequence
    newest: int


@dataclass
class Full:
    """The engine when a waiting sequence last found no row or no blocks."""

    num_running: int
    num_steps: int = 0  # since then


class Scheduler:
    """Invariant: `running` holds the running rows in queue order; waiting sequences come
    later.

    The first running sequence is therefore never preempted while another runs. It always
    makes progress, and no sequence starves. With the policy "priority" both queues are
    sorted by (priority, arrival), and an urgent sequence may enter before running ones.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        columns: Mapping[str, type] | None = None,
        stats: EngineStats | None = None,
        policy: str = "fcfs",
        adapters: Adapters | None = None,
        admission_group: int = 1,
    ) -> None:
        """admission_group: how many sequences enter together when rows or blocks are scarce."""
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos_token_ids = eos_token_ids
        self.enable_prefix_caching = enable_prefix_caching
        self.enable_chunked_prefill = enable_chunked_prefill
        self.stats = stats or EngineStats()
        self.by_priority = policy == "priority"
        self.adapters = adapters  # None: no sequence has an adapter
        self.passed: Passed | None = None
        self.admission_group = admission_group
        self.full: Full | None = None
        self.blocks = BlockManager(num_blocks, block_size)
        self.table = SequenceTable(max_num_seqs, max_model_len, block_size, columns)
        self.running = np.empty(0, np.int64)
        self.waiting: deque[Sequence] = deque()
        self.unfinished: dict[int, Sequence] = {}
        self.newest = -1  # the seq_id of the sequence that arrived last
        self.failures: list[Failure] = []  # of admissions; the engine ends their requests

    def add(self, seq: Sequence) -> None:
        self.newest = seq.seq_id
        self.unfinished[seq.seq_id] = seq
        self._wait(seq, len(self.waiting))

    def _wait(self, seq: Sequence, place: int) -> None:
        """Puts a sequence into the waiting queue. `place` is its place without priorities."""
        if self.by_priority:
            place = bisect(self.waiting, urgency(seq), key=urgency)
        self.waiting.insert(place, seq)

    def sort_waiting_longest_first(self) -> None:
        """Sorts the waiting queue by output budget, longest first.

        Only used for requests that arrived together. If there are more of them than rows,
        the last steps then do not consist of a few long sequences alone. The policy
        "priority" keeps its own order.
        """
        if self.by_priority:
            return
        self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.prompt_len - seq.end))

    def needs_previous_tokens(self) -> bool:
        """Whether the next step's sampling must know the tokens of the step in flight."""
        return bool(self.table.needs_previous_token[self.running].any())

    def reset_prefix_cache(self) -> None:
        """Makes all cached prefixes unfindable. Running sequences go on, and register nothing."""
        self.blocks.reset()
        self.table.num_registered[self.running] = self.blocks.num_blocks

    # -- planning ----------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step. None if nothing can run before the tokens in flight are known."""
        table = self.table
        preemptions = self.stats.num_preemptions
        rows, counts = self._grant_running()
        starts = table.num_computed[rows]
        sampled = self._advance(rows, counts)
        grants = [(rows, starts, counts, sampled)]
        budget = self.max_num_batched_tokens - int(counts.sum())
        is_open = self._admits(counts, sampled)
        while is_open and self.waiting and budget > 0 and table.free_rows:
            if self.stats.num_preemptions > preemptions:
                break
            seq = self._next_waiting()
            row = None if seq is None else self._try_to_admit(seq, budget)
            if row is None:
                break
            new = np.array([row])
            start = table.num_computed[new]
            count = np.minimum(table.num_tokens[new] - start, budget)
            end = int(start[0] + count[0])
            self._allocate(new, ceil_div(end, self.block_size) - table.num_blocks[new])
            grants.append((new, start, count, self._advance(new, count)))
            self._run(row)
            budget -= int(count[0])
        if is_open:
            is_full = bool(self.waiting) and budget > 0
            self.full = Full(len(self.running)) if is_full else None
        if len(grants) > 1:
            rows, starts, counts, sampled = map(np.concatenate, zip(*grants))
        if not len(rows):
            return None
        picked = np.flatnonzero(sampled)
        return Step(rows, starts, starts + counts, picked, table.seq_id[rows[picked]])

    def _run(self, row: int) -> None:
        place = len(self.running)
        if self.by_priority:
            seqs = self.table.seqs
            running = [urgency(seqs[other]) for other in self.running.tolist()]
            place = bisect(running, urgency(seqs[row]))
        self.running = np.insert(self.running, place, row)

    def _grant_running(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and blocks for the running sequences: (rows, counts), counts above 0.

        Preempts the last running sequence while blocks are short.
        """
        table = self.table
        while True:
            rows = self.running
            num_tokens = table.num_tokens[rows]
            computed = table.num_computed[rows]
            # A sequence whose end is known, but not its last token, has nothing left to
            # compute.
            wanted = np.where(num_tokens < table.end[rows], num_tokens - computed, 0)
            counts = wanted
            if wanted.sum() > self.max_num_batched_tokens:
                wanted_before = np.cumsum(wanted) - wanted
                counts = np.clip(self.max_num_batched_tokens - wanted_before, 0, wanted)
            # A new block is due when the computed tokens no longer fit into the
            # sequence's blocks.
            needed = ceil_div(computed + counts, self.block_size) - table.num_blocks[rows]
            needed = np.maximum(needed, 0)
            if needed.sum() <= self.blocks.num_free:
                break
            self._preempt(table.seqs[rows[-1]])
        is_short = needed > 0
        self._allocate(rows[is_short], needed[is_short])
        has_work = counts > 0
        return rows[has_work], counts[has_work].astype(np.int32)

    def _admits(self, counts: np.ndarray, sampled: np.ndarray) -> bool:
        """Whether waiting sequences may enter a step in which running ones compute `counts`.

        While rows or blocks are scarce, sequences enter in groups. The steps between two
        groups only decode, and such steps replay whole CUDA graphs. A group enters when
        `admission_group` running sequences have ended. Fewer are enough if fewer wait. A
        group enters after ADMISSION_STEPS steps in any case. A step that computes a prompt
        anyway is open to all waiting sequences.
        """
        full = self.full
        if full is None or self.admission_group == 1:
            return True
        full.num_steps += 1
        num_ended = full.num_running - len(self.running)
        if num_ended >= min(self.admission_group, len(self.waiting)):
            return True
        only_decodes = len(counts) > 0 and counts.max() == 1 and bool(sampled.all())
        return not only_decodes or full.num_steps >= ADMISSION_STEPS

    def _next_waiting(self) -> Sequence | None:
        """The first waiting sequence whose adapter may run beside the adapters that run.

        Sequences that arrive after the head of the queue was first passed over do not
        pass it, so it does not starve.
        """
        head = self.waiting[0]
        if self.adapters is None:
            return head
        running = {self.table.seqs[row].adapter for row in self.running.tolist()}
        for seq in self.waiting:
            is_late = self.passed is not None and seq.seq_id > self.passed.newest
            if seq is not head and is_late:
                continue
            if self.adapters.may_join(seq.adapter, running):
                return seq
            if seq is head and (self.passed is None or self.passed.head is not head):
                self.passed = Passed(head, self.newest)
        return None

    def _try_to_admit(self, seq: Sequence, budget: int) -> int | None:
        try:
            return self._admit(seq, budget)
        except Exception as error:  # the sequence has acquired no block that it does not know of
            self.failures.append(Failure(seq, error))
            return None

    def _admit(self, seq: Sequence, budget: int) -> int | None:
        """A row for the sequence with its prefix hit, or None if it cannot run now.

        The sequence is admitted only if all its tokens fit beside the tokens that running
        sequences have yet to compute: a chunked prompt never preempts another chunked
        prompt.
        """
        table, blocks = self.table, self.blocks
        length = len(seq.token_ids)
        if not self.enable_chunked_prefill and length > self.max_num_batched_tokens:
            return None
        promised = ceil_div(table.num_tokens[self.running], self.block_size)
        promised = promised - table.num_blocks[self.running]
        num_free = blocks.num_free - int(np.maximum(promised, 0).sum())
        if num_free <= 0:
            return None
        hit = blocks.match(seq.token_ids, self._hash_seed(seq)) if seq.reads_cache else []
        # The last token's logits are needed even if its K/V is cached. The query is then
        # that one token, and it is not written again (its slot is -1), because others may
        # read the page.
        num_cached = min(len(hit) * self.block_size, length - 1)
        needed = ceil_div(length, self.block_size) - len(hit)
        if needed + blocks.num_free_in(hit) > num_free:
            return None
        if not self.enable_chunked_prefill and length - num_cached > budget:
            return None
        if seq.adapter is not None and self.adapters is not None:
            self.adapters.load(seq.adapter, {each.adapter for each in table.seqs.values()})
        row = table.admit(seq)
        self.waiting.remove(seq)
        table.block_table[row, : len(hit)] = blocks.acquire(hit)
        table.num_blocks[row] = len(hit)
        table.num_registered[row] = len(hit)
        table.num_computed[row] = num_cached
        table.num_cached[row] = len(hit) * self.block_size
        seq.prefix = hit[-1] if hit else None
        if seq.num_cached_tokens < 0:  # first admission
            seq.num_cached_tokens = num_cached
            self.stats.prompt_tokens += length
            self.stats.prefix_cache_queries += length
            self.stats.prefix_cache_hits += num_cached
        return row

    def _allocate(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Gives each row its count of new blocks."""
        table = self.table
        owner = np.repeat(rows, counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)  # of the same owner
        place = table.num_blocks[owner] + np.arange(len(owner)) - first
        table.block_table[owner, place] = self.blocks.allocate(len(owner))
        table.num_blocks[rows] += counts

    def _advance(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Counts the tokens as computed and registers full blocks. Returns which rows sample."""
        table = self.table
        num_tokens = table.num_tokens[rows]
        known = num_tokens - (table.token_ids[rows, num_tokens - 1] == PENDING)
        computed = table.num_computed[rows] + counts
        table.num_computed[rows] = computed
        # A block whose last token is pending has no hash yet. The next step registers it.
        num_full = np.minimum(computed, known) // self.block_size
        for i in np.flatnonzero(num_full > table.num_registered[rows]):
            self._register(int(rows[i]), int(num_full[i]))
        sampled = computed == num_tokens
        table.token_ids[rows[sampled], num_tokens[sampled]] = PENDING
        table.num_tokens[rows[sampled]] += 1
        return sampled

    def _register(self, row: int, num_full: int) -> None:
        table, size = self.table, self.block_size
        seq = table.seqs[row]
        hash_seed = self._hash_seed(seq)
        for i in range(int(table.num_registered[row]), num_full):
            tokens = table.token_ids[row, i * size : (i + 1) * size]
            block_id = int(table.block_table[row, i])
            seq.prefix = self.blocks.register(block_id, tokens, seq.prefix, hash_seed)
        table.num_registered[row] = num_full

    def _hash_seed(self, seq: Sequence) -> int:
        """Where a sequence's hash chain starts. It covers whatever changes K/V besides
        the tokens.

        With prefix caching off only the sequences of one request share blocks.
        """
        return seq.hash_seed if self.enable_prefix_caching else 1 + seq.request_number

    def _preempt(self, seq: Sequence) -> None:
        """Preemption by recomputation: frees the blocks, keeps the tokens, comes back first."""
        self.stats.num_preemptions += 1
        self._release(seq)
        self._wait(seq, 0)

    def _release(self, seq: Sequence) -> None:
        row = seq.row
        self.blocks.release(self.table.blocks_of(row), keep=self.enable_prefix_caching)
        self.running = self.running[self.running != row]
        self.table.remove(seq)

    # -- results -----------------------------------------------------------------------------------

    def update(self, step: Step, tokens: np.ndarray) -> list[tuple[int, Sequence]]:
        """Stores the sampled tokens [K] and finishes the sequences that they end.

        Returns (index into tokens, sequence) of the sequences that are finished or stream
        their tokens. A sequence that ended after the launch of the step (EOS noticed one
        step late, an abort) drops its surplus token here.
        """
        table = self.table
        rows = step.rows[step.sampled]
        positions = step.ends[step.sampled]
        is_live = table.seq_id[rows] == step.seq_ids
        table.token_ids[rows[is_live], positions[is_live]] = tokens[is_live]
        check = ~is_live | (positions + 1 >= table.end[rows]) | table.checks_every_token[rows]
        for eos in self.eos_token_ids:
            check |= (tokens == eos) & ~table.ignore_eos[rows]
        new_tokens: list[tuple[int, Sequence]] = []
        for i in np.flatnonzero(check).tolist():
            seq = self.unfinished.get(int(step.seq_ids[i]))
            if seq is None:
                continue
            if seq.row < 0:  # preempted since the launch: the pending token is its last
                seq.token_ids[positions[i]] = tokens[i]
            self._finish_if_ended(seq, int(tokens[i]), int(positions[i]) + 1)
            if seq.finish_reason or seq.streams_tokens:
                new_tokens.append((i, seq))
        return new_tokens

    def _finish_if_ended(self, seq: Sequence, token: int, length: int) -> None:
        """EOS, then stop tokens, then length: the order decides which reason is given."""
        may_stop = length - seq.prompt_len >= seq.params.min_tokens
        if may_stop and token in self.eos_token_ids and not seq.params.ignore_eos:
            self.finish(seq, "stop")
        elif may_stop and token in seq.stop_token_ids:
            self.finish(seq, "stop", token)
        elif length >= seq.end:
            self.finish(seq, "length")

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """Ends a sequence, running or waiting, and frees its blocks."""
        if seq.row >= 0:
            self._release(seq)
        else:
            self.waiting.remove(seq)
        del self.unfinished[seq.seq_id]
        seq.token_ids = seq.token_ids[seq.token_ids != PENDING]  # a surplus token is in flight
        self.stats.generation_tokens += len(seq.token_ids) - seq.prompt_len
        seq.finish_reason = reason
        seq.stop_reason = stop_reason


def urgency(seq: Sequence) -> tuple[int, int]:
    """The key by which the policy "priority" sorts, most urgent first."""
    return seq.priority, seq.seq_id
