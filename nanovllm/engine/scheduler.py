"""Decides which sequences run in a step and how many tokens of each, and applies what the step sampled.

There is no prefill mode and no decode mode. A sequence has tokens it knows (`num_tokens`) and tokens whose K/V is in the
cache (`num_computed`); a step computes some of the difference within one token budget. A prefill is a large difference,
a decode a difference of one, a chunk a part of a difference: continuous batching and chunked prefill are the same line.
The scheduler knows no torch and no text.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import PENDING, Sequence, SequenceTable


@dataclass
class Step:
    """One step's plan: sequence in `rows[i]` computes tokens `starts[i]:ends[i]`; those in `sampled` get a new token."""

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    sampled: np.ndarray  # indices into rows
    seq_ids: np.ndarray  # of the sampled; a row may change hands before the tokens come back


class Scheduler:
    """Invariant: `order` holds the running rows as they stood in the queue, and every waiting sequence stood behind them.

    The first sequence is therefore never preempted while another runs, so it always makes progress and nobody starves.
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
    ) -> None:
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos_token_ids = eos_token_ids
        self.enable_prefix_caching = enable_prefix_caching
        self.enable_chunked_prefill = enable_chunked_prefill
        self.blocks = BlockManager(num_blocks, block_size)
        self.table = SequenceTable(max_num_seqs, max_model_len, block_size)
        self.order = np.empty(0, np.int64)
        self.waiting: deque[Sequence] = deque()
        self.unfinished: dict[int, Sequence] = {}
        self.failures: list[tuple[Sequence, Exception]] = []  # what was raised in a sequence's own part of a step
        self.num_preemptions = 0
        self.prompt_tokens = self.generation_tokens = 0
        self.prefix_cache_queries = self.prefix_cache_hits = 0  # in tokens

    def add(self, seq: Sequence) -> None:
        self.unfinished[seq.seq_id] = seq
        self.waiting.append(seq)

    def longest_first(self) -> None:
        """Lets those that wait in by the most tokens they may generate, where all came at once and nobody watches.

        If there are more of them than fit, the last steps are then not of a few long ones alone.
        """
        self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.prompt_len - seq.end))

    def needs_known_tokens(self) -> bool:
        """Whether the next step's sampling must know the tokens that are in flight."""
        return bool(self.table.waits[self.order].any())

    def reset_prefix_cache(self) -> None:
        """Nothing computed so far can be hit any more; running sequences go on, and register nothing of what they hold."""
        self.blocks.reset()
        self.table.num_registered[self.order] = self.blocks.num_blocks

    # -- planning ----------------------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step, or None when nothing can run before the tokens in flight are known (or nothing is left)."""
        table, before = self.table, self.num_preemptions
        rows, counts = self._grant_running()
        starts = table.num_computed[rows]
        sampled = self._advance(rows, counts)
        parts = [(rows, starts, counts, sampled)]
        budget = self.max_num_batched_tokens - int(counts.sum())
        while self.waiting and budget > 0 and table.free_rows and self.num_preemptions == before:
            seq = self.waiting[0]
            try:
                row = self._admit(seq, budget)
            except Exception as err:  # it has taken no page yet; the engine ends it
                self.failures.append((seq, err))
                break
            if row is None:
                break
            new = np.array([row])
            start = table.num_computed[new]
            count = np.minimum(table.num_tokens[new] - start, budget)
            self._allocate(row, -(-int(start[0] + count[0]) // self.block_size) - int(table.num_blocks[row]))
            parts.append((new, start, count, self._advance(new, count)))
            self.order = np.append(self.order, row)
            budget -= int(count[0])
        if len(parts) > 1:
            rows, starts, counts, sampled = map(np.concatenate, zip(*parts))
        if not len(rows):
            return None
        picked = np.flatnonzero(sampled)
        return Step(rows, starts, starts + counts, picked, table.seq_id[rows[picked]])

    def _grant_running(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and pages for the running sequences: (rows, counts > 0). Preempts the youngest while pages are short."""
        table, size = self.table, self.block_size
        while True:
            rows = self.order
            num_tokens, computed = table.num_tokens[rows], table.num_computed[rows]
            # One that waits for its last token (the end is known before the token is) has nothing left to compute.
            wanted = np.where(num_tokens < table.end[rows], num_tokens - computed, 0)
            counts = np.clip(self.max_num_batched_tokens - (np.cumsum(wanted) - wanted), 0, wanted)
            # A new block is due when the tokens computed after this step no longer fit into those it holds.
            needed = np.maximum(-(-(computed + counts) // size) - table.num_blocks[rows], 0)
            if needed.sum() <= self.blocks.num_free:
                break
            self._preempt(self.table.seqs[rows[-1]])
        for i in np.flatnonzero(needed):
            self._allocate(int(rows[i]), int(needed[i]))
        running = counts > 0
        return rows[running], counts[running].astype(np.int32)

    def _admit(self, seq: Sequence, budget: int) -> int | None:
        """A row for the sequence with its prefix hit taken, or None if the whole of it cannot be paged now.

        It is admitted only if all its tokens fit beside what running sequences have yet to compute: a chunked prompt
        never preempts another on the way.
        """
        table, blocks, size = self.table, self.blocks, self.block_size
        running, length = self.order, len(seq.token_ids)
        promised = np.maximum(-(-table.num_tokens[running] // size) - table.num_blocks[running], 0).sum()
        free = blocks.num_free - int(promised)
        if free <= 0 or (not self.enable_chunked_prefill and length > self.max_num_batched_tokens):
            return None
        root = self._root(seq)
        hit = blocks.match(seq.token_ids, root) if seq.reads_cache else []
        # The logits of the last token are needed even if its K/V is cached: then the query is that one token, and it
        # is not written again (its slot is -1), as others may be reading the page.
        num_cached = min(len(hit) * size, length - 1)
        if -(-length // size) - len(hit) + blocks.num_free_in(hit) > free:
            return None
        if not self.enable_chunked_prefill and length - num_cached > budget:
            return None
        row = table.admit(seq)
        self.waiting.popleft()
        table.block_table[row, : len(hit)] = blocks.hold(hit)
        table.num_blocks[row] = table.num_registered[row] = len(hit)
        table.num_computed[row] = num_cached
        table.num_cached[row] = len(hit) * size
        seq.prefix = hit[-1] if hit else None
        if seq.num_cached_tokens < 0:
            seq.num_cached_tokens = num_cached
            self.prompt_tokens += length
            self.prefix_cache_queries += length
            self.prefix_cache_hits += num_cached
        return row

    def _allocate(self, row: int, count: int) -> None:
        held = int(self.table.num_blocks[row])
        self.table.block_table[row, held : held + count] = self.blocks.allocate(count)
        self.table.num_blocks[row] = held + count

    def _advance(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Counts the tokens as computed, makes full blocks findable, and returns which rows sample a new token."""
        table = self.table
        num_tokens = table.num_tokens[rows]
        known = num_tokens - (table.token_ids[rows, num_tokens - 1] == PENDING)
        computed = table.num_computed[rows] + counts
        table.num_computed[rows] = computed
        # A block whose last token is still pending has no hash yet; it is registered in the step after.
        full = np.minimum(computed, known) // self.block_size
        for i in np.flatnonzero(full > table.num_registered[rows]):
            self._register(int(rows[i]), int(full[i]))
        sampled = computed == num_tokens
        table.token_ids[rows[sampled], num_tokens[sampled]] = PENDING
        table.num_tokens[rows[sampled]] += 1
        return sampled

    def _register(self, row: int, full: int) -> None:
        table, size, seq = self.table, self.block_size, self.table.seqs[row]
        for i in range(int(table.num_registered[row]), full):
            tokens = table.token_ids[row, i * size : (i + 1) * size]
            seq.prefix = self.blocks.register(int(table.block_table[row, i]), tokens, seq.prefix, self._root(seq))
        table.num_registered[row] = full

    def _root(self, seq: Sequence) -> int:
        """Where its hash chain starts. With prefix caching off only the sequences of one request share pages."""
        return 0 if self.enable_prefix_caching else 1 + seq.request_number

    def _preempt(self, seq: Sequence) -> None:
        """Preemption by recomputation: its pages go, its tokens stay, and it is first in line to come back."""
        self.num_preemptions += 1
        self._release(seq)
        self.waiting.appendleft(seq)

    def _release(self, seq: Sequence) -> None:
        row = seq.row
        self.blocks.release(self.table.blocks_of(row), keep=self.enable_prefix_caching)
        self.order = self.order[self.order != row]
        self.table.remove(seq)

    # -- results -----------------------------------------------------------------------------------------------------

    def update(self, step: Step, tokens: np.ndarray) -> list[tuple[int, Sequence]]:
        """Puts the sampled tokens [len(step.sampled)] in place and finishes the sequences that they end.

        Returns (index into tokens, sequence) of those that are finished or watched. A sequence that ended since the
        step was launched (an EOS noticed one step late, an abort) drops its surplus token here.
        """
        table, rows, positions = self.table, step.rows[step.sampled], step.ends[step.sampled]
        live = table.seq_id[rows] == step.seq_ids
        table.token_ids[rows[live], positions[live]] = tokens[live]
        look = ~live | (positions + 1 >= table.end[rows]) | table.looked_at[rows]
        for eos in self.eos_token_ids:
            look |= (tokens == eos) & ~table.ignore_eos[rows]
        news: list[tuple[int, Sequence]] = []
        for i in np.flatnonzero(look).tolist():
            seq = self.unfinished.get(int(step.seq_ids[i]))
            if seq is None:
                continue
            if seq.row < 0:  # preempted meanwhile: it waits with the pending token as its last
                seq.token_ids[positions[i]] = tokens[i]
            self._finish_if_ended(seq, int(tokens[i]), int(positions[i]) + 1)
            if seq.finish_reason or seq.watched:
                news.append((i, seq))
        return news

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
        """Ends a sequence wherever it is, and frees its pages."""
        if seq.row >= 0:
            self._release(seq)
        else:
            self.waiting.remove(seq)
        del self.unfinished[seq.seq_id]
        seq.token_ids = seq.token_ids[seq.token_ids != PENDING]  # a surplus token is still in flight
        self.generation_tokens += len(seq.token_ids) - seq.prompt_len
        seq.finish_reason, seq.stop_reason = reason, stop_reason
