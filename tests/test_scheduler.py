"""Scheduler, sequence table, block manager and batch together, with no model: random traces against
a fake device.

The device's "K/V" of a token is a hash of all tokens up to it, and the next token a hash of that,
so every sequence has one right text, whatever company, cache or budget it runs with. What a
sequence reads through its block table must be the hashes of its own text: a page overwritten too
early, a wrong hit, a slot or a position off by one all show.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh64_intdigest

from nanovllm.core.ability import Ability
from nanovllm.core.batch import Batch, ceil_div, pack, unpack
from nanovllm.core.sequence import PENDING, Sequence
from nanovllm.core.step import Step
from nanovllm.engine.batch_builder import build_batch, uniform
from nanovllm.engine.input_processor import InputProcessor, hash_seed
from nanovllm.engine.scheduler import ADMISSION_STEPS, Scheduler
from nanovllm.runner.readouts.prompt_logprobs import PromptLogprobs
from nanovllm.sampling.sampler import sampling_abilities
from nanovllm.sampling_params import SamplingParams

VOCAB, EOS, STOP = 20, 0, 1


def weak_hash(data: bytes, seed: int) -> int:
    """Two bits: nearly every lookup collides."""
    return xxh64_intdigest(data, seed) & 3


# -- the one right text of a sequence --------------------------------------------------------------


@lru_cache(maxsize=4096)
def text_of(prompt: tuple[int, ...], seed: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`length` token ids that begin with the prompt, and the hash of every prefix: what its K/V
    must be.
    """
    tokens, contents = list(prompt), list[int]()
    for i in range(length):
        contents.append(hash((contents[-1] if i else 0, tokens[i])))
        if i + 1 >= len(prompt):
            tokens.append(next_token(contents[-1], seed))
    return np.array(tokens[:length], np.int32), np.array(contents, np.int64)


def next_token(content: int, seed: int) -> int:
    return hash((int(content), seed)) % 1009 % VOCAB


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    max_tokens: int = 1
    arrival: int = 0  # before which step
    n: int = 1
    same_seed: bool = True  # its siblings write the same text
    ignore_eos: bool = False
    min_tokens: int = 0
    stop: bool = False  # token STOP ends it
    stop_text: int | None = (
        None  # tokens until a stop string ends it, which the scheduler does not see
    )
    streams_tokens: bool = False
    reads_cache: bool = True
    needs_previous_token: bool = False
    abort: int | None = None  # before which step
    priority: int = 0

    def result(self, seed: int, end: int) -> tuple[np.ndarray, str]:
        """The tokens and the finish reason that it must come to."""
        tokens, _ = text_of(self.prompt, seed, end)
        for length in range(len(self.prompt) + 1, end + 1):
            count, token = length - len(self.prompt), tokens[length - 1]
            ended = (token == EOS and not self.ignore_eos) or (token == STOP and self.stop)
            if (ended and count >= self.min_tokens) or (length < end and count == self.stop_text):
                return tokens[:length], "stop"
        return tokens, "length"


@dataclass(frozen=True)
class Config:
    block_size: int = 4
    max_model_len: int = 32
    spare_blocks: int = 100  # beyond one sequence of max_model_len
    max_num_seqs: int = 8
    spare_tokens: int = 100  # of the step's budget, beyond its minimum
    overlap: bool = False
    caching: bool = True
    chunked: bool = True
    weak_hash: bool = False
    resets: frozenset[int] = frozenset()  # before which steps the prefix cache is emptied
    policy: str = "fcfs"
    admission_group: int = 1

    @property
    def num_blocks(self) -> int:
        return ceil_div(self.max_model_len, self.block_size) + self.spare_blocks

    @property
    def budget(self) -> int:
        least = self.max_num_seqs if self.chunked else max(self.max_num_seqs, self.max_model_len)
        return self.spare_tokens + least

    def scheduler(self, columns: dict[str, type] | None = None) -> Scheduler:
        return Scheduler(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            eos_token_ids=frozenset({EOS}),
            enable_prefix_caching=self.caching,
            enable_chunked_prefill=self.chunked,
            columns=columns,
            policy=self.policy,
            admission_group=self.admission_group,
        )


# -- the device, and the engine's loop -------------------------------------------------------------


class Device:
    """Pages that hold prefix hashes instead of K/V, and the last token of every row."""

    def __init__(self, config: Config) -> None:
        self.size = config.block_size
        self.pages = np.zeros(config.num_blocks * self.size, np.int64)
        self.written = np.full(len(self.pages), -1)  # in which step
        self.last_tokens = np.zeros(config.max_num_seqs, np.int64)

    def read(self, block_table: np.ndarray, length: int) -> np.ndarray:
        positions = np.arange(length)
        return self.pages[block_table[positions // self.size] * self.size + positions % self.size]

    def launch(
        self,
        batch: Batch[np.ndarray],
        seqs: list[Sequence],
        texts: list[tuple[np.ndarray, np.ndarray]],
        now: int,
    ) -> np.ndarray:
        """Runs one step. All of it is written before anything is read, as every layer does."""
        ids, rows, attention = batch.tokens.ids, batch.tokens.rows, batch.attention
        tokens = np.where(ids == PENDING, self.last_tokens[rows], ids)
        bounds = list(pairwise(attention.query_start.tolist()))
        contexts = attention.context_lens.tolist()
        assert len(bounds) == len(seqs) == len(contexts)
        writes = []
        for (begin, end), context, seq, (text, contents) in zip(bounds, contexts, seqs, texts):
            where = np.arange(context - (end - begin), context)
            assert len(where) > 0
            assert (attention.positions[begin:end] == where).all()
            assert (rows[begin:end] == seq.row).all()
            assert (tokens[begin:end] == text[where]).all()
            writes.append(contents[where])
        stored = attention.slot_mapping >= 0
        slots = attention.slot_mapping[stored]
        assert len(set(slots.tolist())) == len(slots)
        self.pages[slots], self.written[slots] = np.concatenate(writes)[stored], now
        for block_table, context, (_, contents) in zip(attention.block_tables, contexts, texts):
            assert (self.read(block_table, context) == contents[:context]).all()
        last = {int(end) - 1: i for i, end in enumerate(attention.query_start[1:])}
        sampled = []
        for at, row in zip(batch.sample.at.tolist(), batch.sample.rows.tolist()):
            i = last[at]
            assert seqs[i].row == row
            content = self.read(attention.block_tables[i], contexts[i])[-1]
            sampled.append(next_token(content, seqs[i].seed))
        self.last_tokens[batch.sample.rows] = sampled
        return np.array(sampled, np.int64)


@dataclass
class Trace:
    """Runs requests to their end as LLMEngine does, and checks every promise after every step."""

    config: Config
    requests: list[Request]
    seqs: list[Sequence] = field(default_factory=list)
    steps: list[tuple[Step, Batch[np.ndarray]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler, self.device = self.config.scheduler(), Device(self.config)
        self.in_flight: tuple[Step, np.ndarray] | None = None
        self.now, self.last_reset = 0, -1
        self.streams: dict[int, list[int]] = {}
        self.asked: dict[int, Request] = {}
        self.known: dict[int, tuple[object, np.ndarray]] = {}
        self.passed_over = 0  # steps in a row that the head of the queue could have entered

    def run(self) -> Trace:
        with mock.patch(
            "nanovllm.engine.block_manager.xxh64_intdigest",
            weak_hash if self.config.weak_hash else xxh64_intdigest,
        ):
            arrivals = sorted(range(len(self.requests)), key=lambda i: self.requests[i].arrival)
            limit = 0
            while arrivals or self.scheduler.unfinished:
                while arrivals and (self.requests[arrivals[0]].arrival <= self.now):
                    limit += self.add(arrivals.pop(0))
                for seq in list(self.scheduler.unfinished.values()):
                    abort = self.asked[seq.seq_id].abort
                    if abort is not None and abort <= self.now:
                        self.scheduler.finish(seq, "abort")
                if self.now in self.config.resets:
                    self.scheduler.reset_prefix_cache()
                    self.last_reset = self.now
                if self.scheduler.unfinished:
                    assert limit > 0, "a request never finishes"
                    limit -= 1
                self.step()
                self.check()
                self.now += 1
        self.check_end()
        return self

    def add(self, number: int) -> int:
        """Queues a request. Returns in how many steps it must be done once it is the oldest."""
        request, config = self.requests[number], self.config
        end = min(len(request.prompt) + request.max_tokens, config.max_model_len)
        for index in range(request.n):
            seq = Sequence(
                seq_id=len(self.seqs),
                params=SamplingParams(
                    ignore_eos=request.ignore_eos, min_tokens=request.min_tokens, max_tokens=None
                ),
                token_ids=np.array(request.prompt, np.int32),
                end=end,
                request_number=number,
                seed=0 if request.same_seed else number * 10 + index,
                stop_token_ids=frozenset({STOP} if request.stop else ()),
                needs_previous_token=request.needs_previous_token,
                streams_tokens=request.streams_tokens or request.stop_text is not None,
                reads_cache=request.reads_cache,
                priority=request.priority,
            )
            self.seqs.append(seq)
            self.asked[seq.seq_id], self.streams[seq.seq_id] = request, []
            self.scheduler.add(seq)
        # The oldest is never preempted: it computes its prompt within the budget that others leave,
        # then a token a step. One step more for a token that is noticed late, one for a preemption
        # just before it became the oldest.
        least = config.budget - config.max_num_seqs + 1
        # Each more urgent arrival may preempt it, and it then computes its text again.
        times = 1 + len(self.requests) * 3 if config.policy == "priority" else 1
        return times * request.n * (ceil_div(end, least) + end - len(request.prompt) + 2)

    def step(self) -> None:
        """`LLMEngine._step`."""
        if self.in_flight and self.scheduler.needs_previous_tokens():
            self.collect()
        launched = self.launch()
        if self.in_flight:
            self.collect()
        self.in_flight = launched
        if launched and not self.config.overlap:
            self.collect()
        if not self.scheduler.unfinished:
            self.in_flight = None

    def text(self, seq: Sequence) -> tuple[np.ndarray, np.ndarray]:
        return text_of(self.asked[seq.seq_id].prompt, seq.seed, seq.end)

    def launch(self) -> tuple[Step, np.ndarray] | None:
        scheduler = self.scheduler
        head = self.head_that_fits()
        step = scheduler.schedule()
        is_passed_over = head is not None and head.row < 0
        self.passed_over = self.passed_over + 1 if is_passed_over else 0
        limit = 0 if self.config.admission_group == 1 else ADMISSION_STEPS - 1
        assert self.passed_over <= limit, "the head of the queue waits too long"
        if step is None:
            assert self.in_flight or not scheduler.unfinished, "unfinished work, and nothing runs"
            return None
        assert (step.ends > step.starts).all()
        assert (step.ends - step.starts).sum() <= self.config.budget
        assert len(set(step.rows.tolist())) == len(step.rows) <= self.config.max_num_seqs
        batch, _ = build_batch(scheduler.table, step, scheduler.block_size)
        seqs = [scheduler.table.seqs[row] for row in step.rows]
        for seq, end in zip(seqs, step.ends):
            assert end < seq.end, "computes a token that is its last"
        self.steps.append((step, batch))
        return step, self.device.launch(batch, seqs, [self.text(seq) for seq in seqs], self.now)

    def head_that_fits(self) -> Sequence | None:
        """The first waiting sequence, if a row, blocks and tokens are certainly left for it."""
        scheduler, table, config = self.scheduler, self.scheduler.table, self.config
        if not scheduler.waiting or not table.free_rows:
            return None
        head = scheduler.waiting[0]
        running = table.seqs.values()
        lengths = [int(table.num_tokens[seq.row]) + 1 for seq in running]
        blocks = sum(ceil_div(length, config.block_size) for length in lengths)
        used = sum(int(table.num_blocks[seq.row]) for seq in running)
        growth = ceil_div(len(head.token_ids), config.block_size) + max(blocks - used, 0)
        tokens = sum(lengths) - sum(int(table.num_computed[seq.row]) for seq in running)
        tokens += 1 if config.chunked else len(head.token_ids)
        fits = growth <= scheduler.blocks.num_free and tokens <= config.budget
        return head if fits else None

    def collect(self) -> None:
        (step, tokens), self.in_flight = self.in_flight, None
        for i, seq in self.scheduler.update(step, tokens):
            assert seq.finish_reason or seq.streams_tokens
            stream, request = self.streams[seq.seq_id], self.asked[seq.seq_id]
            stream.append(int(tokens[i]))
            if len(stream) == request.stop_text and seq.finish_reason is None:
                self.scheduler.finish(seq, "stop", "a stop string")

    # -- promises ----------------------------------------------------------------------------------

    def check(self) -> None:
        self.check_rows()
        self.check_blocks()
        self.check_cache()

    def check_rows(self) -> None:
        scheduler, table = self.scheduler, self.scheduler.table
        running = scheduler.running.tolist()
        assert sorted(running + table.free_rows) == list(range(self.config.max_num_seqs))
        assert set(table.seqs) == set(running)
        queues = [[table.seqs[row] for row in running], list(scheduler.waiting)]
        if self.config.policy == "priority":
            for queue in queues:
                keys = [(seq.priority, seq.seq_id) for seq in queue]
                assert keys == sorted(keys), "the most urgent is first"
        else:
            ids = [seq.seq_id for queue in queues for seq in queue]
            assert ids == sorted(ids) == list(scheduler.unfinished), "who came first is first"
        for row in running:
            computed = int(table.num_computed[row])
            admitted = table.seqs[row].token_ids
            assert (admitted != PENDING).all(), "admitted before all its tokens were known"
            assert computed < table.num_tokens[row] <= table.end[row]
            contents = self.text(table.seqs[row])[1][:computed]
            assert (self.device.read(table.block_table[row], computed) == contents).all()

    def check_blocks(self) -> None:
        blocks, table = self.scheduler.blocks, self.scheduler.table
        holders = Counter(block for row in self.scheduler.running for block in table.blocks_of(row))
        assert blocks.ref_counts == [holders[block] for block in range(blocks.num_blocks)]
        everything = [*blocks.empty_blocks, *blocks.evictable, *holders]
        assert sorted(everything) == list(range(blocks.num_blocks))
        assert blocks.num_free == blocks.num_blocks - len(holders)
        assert all(blocks.prefixes[block] is None for block in blocks.empty_blocks)
        assert all(blocks.prefixes[block] for block in blocks.evictable)

    def check_cache(self) -> None:
        """Whatever can be hit is in its page, and was computed since the cache was last emptied."""
        blocks, size = self.scheduler.blocks, self.config.block_size
        for digest, prefix in blocks.cached.items():
            assert prefix.hash == digest
            assert blocks.prefixes[prefix.block_id] is prefix
            parent = prefix.parent
            while parent is not None and blocks.cached.get(parent.hash) is parent:
                parent = parent.parent
            if parent is None:
                page = slice(prefix.block_id * size, (prefix.block_id + 1) * size)
                assert (self.device.pages[page] == self.contents(prefix)).all()
                assert self.device.written[page].min() >= self.last_reset

    def contents(self, prefix) -> np.ndarray:
        if id(prefix) not in self.known:
            content, out = self.contents(prefix.parent)[-1] if prefix.parent else 0, []
            for token in np.frombuffer(prefix.tokens, np.int32).tolist():
                content = hash((int(content), token))
                out.append(content)
            self.known[id(prefix)] = prefix, np.array(out, np.int64)
        return self.known[id(prefix)][1]

    def check_end(self) -> None:
        blocks = self.scheduler.blocks
        assert blocks.num_free == blocks.num_blocks
        assert self.config.caching or not blocks.cached
        for seq in self.seqs:
            request = self.asked[seq.seq_id]
            tokens, reason = request.result(seq.seed, seq.end)
            if seq.finish_reason == "abort" and request.abort is not None:
                tokens, reason = tokens[: len(seq.token_ids)], "abort"
            assert (seq.token_ids.tolist(), seq.finish_reason) == (tokens.tolist(), reason)
            generated = seq.token_ids[seq.prompt_len :].tolist()
            if seq.streams_tokens:
                assert self.streams[seq.seq_id] == generated
            assert seq.num_cached_tokens < seq.prompt_len
            if not request.reads_cache:
                assert seq.num_cached_tokens <= 0


# -- random traces ---------------------------------------------------------------------------------

# Prompts begin like one of these, which are what the fake model itself writes: they share prefixes
# with each other, and with what earlier requests generated.
STEMS = [tuple(text_of((first,), 0, 200)[0].tolist()) for first in (2, 3)]


class Dice:
    """Small numbers out of one string of bytes: a hundred draws of hypothesis would cost more than
    a trace. Zeros are plain.
    """

    def __init__(self, data: bytes) -> None:
        self.data = iter(data)

    def __call__(self, low: int, high: int) -> int:
        return low + next(self.data) % (high - low + 1)

    def rare(self, one_in: int) -> bool:
        return self(1, one_in) == one_in


def trace_of(data: bytes) -> tuple[Config, list[Request]]:
    dice = Dice(data)
    size = dice(1, (4, 16)[dice.rare(2)])
    longest = dice(*((20, 40), (2, 4 * size + 2))[dice.rare(3)])
    config = Config(
        block_size=size,
        max_model_len=longest,
        spare_blocks=dice(0, (3, 3, 24)[dice(0, 2)]),
        max_num_seqs=dice(1, 6),
        spare_tokens=dice(0, (4, 80)[dice(0, 1)]),
        overlap=dice.rare(2),
        caching=not dice.rare(4),
        chunked=not dice.rare(4),
        weak_hash=dice.rare(5),
        resets=frozenset(dice(0, 40) for _ in range(2)) if dice.rare(8) else frozenset(),
        policy="priority" if dice.rare(4) else "fcfs",
        admission_group=dice(2, 4) if dice.rare(2) else 1,
    )

    def length() -> int:  # half of them next to a block's edge
        n = dice(0, 4) * size + dice(-1, 1) if dice.rare(2) else dice(1, longest)
        return min(max(n, 1), longest - 1)

    requests = []
    for _ in range(dice(1, 8)):
        prompt = STEMS[dice(0, 1)][: length()]
        if dice.rare(3):  # it leaves the stem somewhere
            fork = length()
            prompt = prompt[:fork] + (dice(1, 4),) * len(prompt[fork:])
        requests.append(
            Request(
                prompt=prompt,
                max_tokens=dice(1, (40, 3)[dice.rare(3)]),
                arrival=dice(0, 40) if dice.rare(2) else 0,
                n=dice(2, 3) if dice.rare(4) else 1,
                same_seed=dice.rare(2),
                ignore_eos=dice.rare(2),
                min_tokens=dice(1, 6) if dice.rare(5) else 0,
                stop=dice.rare(3),
                stop_text=dice(1, 6) if dice.rare(6) else None,
                streams_tokens=dice.rare(2),
                reads_cache=not dice.rare(6),
                needs_previous_token=dice.rare(8),
                abort=dice(0, 40) if dice.rare(6) else None,
                priority=dice(-1, 1),
            )
        )
    return config, requests


traces = st.binary(min_size=264, max_size=264).map(trace_of)


@given(traces)
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_random_traces_keep_every_promise(trace):
    Trace(*trace).run()


# -- one test for each thing that it promises ------------------------------------------------------


def run(*requests: Request, **config) -> Trace:
    return Trace(Config(**config), list(requests)).run()


def plain(length: int, stem: int = 0) -> tuple[int, ...]:
    return STEMS[stem][:length]


def computed(trace: Trace) -> list[list[tuple[int, int]]]:
    """The ranges of positions that each step computes, sequence by sequence."""
    return [list(zip(step.starts.tolist(), step.ends.tolist())) for step, _ in trace.steps]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prefill_and_a_decode_are_the_same_line(overlap):
    trace = run(Request(plain(5), max_tokens=4, ignore_eos=True), overlap=overlap)
    assert computed(trace) == [[(0, 5)], [(5, 6)], [(6, 7)], [(7, 8)]]


def test_a_prompt_beyond_the_budget_is_computed_in_chunks_beside_the_decodes():
    trace = run(
        Request(plain(2), max_tokens=4, ignore_eos=True),
        Request(plain(9, stem=1), ignore_eos=True),
        max_num_seqs=2,
        spare_tokens=2,
    )
    assert computed(trace) == [
        [(0, 2), (0, 2)],
        [(2, 3), (2, 5)],
        [(3, 4), (5, 8)],
        [(4, 5), (8, 9)],
    ]


def test_without_chunks_a_prompt_waits_for_a_step_that_holds_all_of_it():
    long = Request(plain(30, stem=1), ignore_eos=True)
    trace = run(
        Request(plain(5), max_tokens=3, ignore_eos=True), long, chunked=False, spare_tokens=0
    )
    assert computed(trace) == [[(0, 5)], [(5, 6), (0, 30)], [(6, 7)]]


def test_without_chunks_only_what_is_not_cached_must_fit_into_the_step():
    same = Request(plain(30), ignore_eos=True)
    assert computed(run(same, same, chunked=False, spare_tokens=2))[0] == [(0, 30), (28, 30)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("length", "cached"), [(1, 0), (7, 4), (8, 7), (9, 8)])
def test_a_prompt_that_is_wholly_cached_computes_its_last_token_and_writes_nothing(
    length, cached, overlap
):
    trace = run(Request(plain(9)), Request(plain(length), arrival=9), overlap=overlap)
    step, batch = trace.steps[-1]
    assert (step.starts.tolist(), step.ends.tolist()) == ([cached], [length])
    assert trace.seqs[1].num_cached_tokens == cached
    is_dropped = batch.attention.slot_mapping == -1
    assert is_dropped.tolist() == ([True] if length == 8 else [False] * (length - cached))


def test_what_was_generated_is_hit_by_the_next_turn_of_a_conversation():
    trace = run(Request(plain(3), max_tokens=11, ignore_eos=True), Request(plain(16), arrival=20))
    assert trace.seqs[1].num_cached_tokens == 12, "13 of 14 tokens were computed: three blocks"


@pytest.mark.parametrize("caching", [False, True])
def test_siblings_are_prefilled_once_in_one_step(caching):
    trace = run(
        Request(plain(9), n=3, max_tokens=3, ignore_eos=True, same_seed=False),
        caching=caching,
        spare_blocks=0,
    )
    assert computed(trace)[0] == [(0, 9), (8, 9), (8, 9)]
    tables = trace.steps[0][1].attention.block_tables.tolist()
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3


def test_equal_prompts_of_two_requests_share_pages_within_their_first_step_if_caching_is_on():
    requests = Request(plain(8), max_tokens=3), Request(plain(8), max_tokens=3)
    assert computed(run(*requests))[0] == [(0, 8), (7, 8)]
    assert computed(run(*requests, caching=False))[0] == [(0, 8), (0, 8)]


def test_without_caching_nothing_is_kept():
    trace = run(Request(plain(9)), Request(plain(9), arrival=5), caching=False)
    assert [seq.num_cached_tokens for seq in trace.seqs] == [0, 0]
    assert not trace.scheduler.blocks.cached


def test_a_sequence_that_must_see_its_prompt_reads_no_cache_but_fills_it():
    whole = Request(plain(9), reads_cache=False)
    trace = run(whole, replace(whole, arrival=5), Request(plain(9), arrival=10))
    assert [seq.num_cached_tokens for seq in trace.seqs] == [0, 0, 8]


def test_a_block_whose_last_token_is_in_flight_cannot_be_hit_until_it_is_known():
    scheduler = Config(overlap=True).scheduler()
    scheduler.add(
        Sequence(0, SamplingParams(ignore_eos=True), np.array(plain(3), np.int32), end=30)
    )
    first = scheduler.schedule()
    second = scheduler.schedule()  # computes position 3, whose token is not known
    assert second.ends.tolist() == [4]
    assert not scheduler.blocks.cached
    scheduler.update(first, np.array([7]))
    assert not scheduler.blocks.cached
    scheduler.schedule()
    assert len(scheduler.blocks.match(np.array([*plain(3), 7], np.int32), 0)) == 1
    assert not scheduler.blocks.match(np.array([*plain(3), PENDING], np.int32), 0)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("caching", [False, True])
def test_a_preempted_sequence_gives_the_same_tokens(caching, overlap):
    requests = [Request(plain(9, stem=i % 2)[i:], max_tokens=30, ignore_eos=True) for i in range(5)]
    trace = run(*requests, spare_blocks=2, overlap=overlap, caching=caching)
    assert trace.scheduler.stats.num_preemptions >= 5


def test_with_the_policy_priority_lower_values_are_admitted_first_and_preempted_last():
    """One row: requests run one after the other. Two blocks: the less urgent one gives way."""
    scheduler = Config(max_num_seqs=1, policy="priority").scheduler()
    for seq_id, priority in enumerate([3, 1, 2, 1, -5]):
        scheduler.add(waiting_sequence(seq_id, priority))
    assert [seq.seq_id for seq in scheduler.waiting] == [4, 1, 3, 2, 0]
    step = scheduler.schedule()
    assert scheduler.table.seqs[int(step.rows[0])].seq_id == 4

    scheduler = Config(max_model_len=8, spare_blocks=0, policy="priority").scheduler()
    scheduler.add(waiting_sequence(0, priority=7))
    scheduler.add(waiting_sequence(1, priority=2))
    for _ in range(3):  # both have 3 tokens, and grow into a second block
        step = scheduler.schedule()
        scheduler.update(step, np.full(len(step.sampled), 5))
    assert [scheduler.table.seqs[row].seq_id for row in scheduler.running.tolist()] == [1]
    assert [seq.seq_id for seq in scheduler.waiting] == [0]


def waiting_sequence(seq_id: int, priority: int) -> Sequence:
    tokens = np.array([7 + seq_id, 8, 9], np.int32)
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    return Sequence(seq_id, params, tokens, end=8, priority=priority)


def test_prompts_share_blocks_only_under_the_same_salt():
    def cached(*salts: str | None) -> list[int]:
        scheduler = Config().scheduler()
        found = []
        for seq_id, salt in enumerate(salts):
            seq = Sequence(seq_id, SamplingParams(), np.array(plain(9), np.int32), end=10)
            seq.hash_seed = hash_seed(salt, None)
            scheduler.add(seq)
            step = scheduler.schedule()
            scheduler.update(step, np.array([7]))
            found.append(seq.num_cached_tokens)
        return found

    assert cached(None, None, "a", "a", "b", None, "b") == [0, 8, 0, 8, 0, 8, 8]


def test_a_late_eos_drops_the_surplus_token():
    eos = STEMS[1].index(EOS)
    request = Request(plain(2, stem=1), max_tokens=30)
    ahead, plainly = run(request, overlap=True), run(request)
    assert (
        ahead.seqs[0].token_ids.tolist()
        == plainly.seqs[0].token_ids.tolist()
        == list(STEMS[1][: eos + 1])
    )
    assert len(ahead.steps) == len(plainly.steps) + 1


@pytest.mark.parametrize("overlap", [False, True])
def test_a_sequence_whose_pending_token_ends_it_while_it_is_preempted_is_finished(overlap):
    """Two blocks: when the older needs both, the younger's last token is sampled.

    With overlap it is not known yet.
    """
    requests = [
        Request(plain(3, stem), max_tokens=tokens, ignore_eos=True)
        for stem, tokens in ((0, 5), (1, 2))
    ]
    trace = run(*requests, max_model_len=8, spare_blocks=0, overlap=overlap)
    assert trace.scheduler.stats.num_preemptions == overlap


@pytest.mark.parametrize("spare_tokens", [0, 100])
def test_a_prompt_is_admitted_only_if_all_of_it_fits_beside_what_others_need_next(spare_tokens):
    """Seven blocks: five for the second would be free, but the first is about to need one of them,
    and would throw it out.
    """
    first = Request(plain(8), max_tokens=9, ignore_eos=True)
    second = Request(plain(19, stem=1), ignore_eos=True)
    trace = run(first, second, max_model_len=20, spare_blocks=2, spare_tokens=spare_tokens)
    assert trace.scheduler.stats.num_preemptions == 0
    assert all(len(step.rows) == 1 for step, _ in trace.steps)


def steps_of(lengths: list[int], reorder: bool) -> int:
    scheduler = Scheduler(
        num_blocks=100, block_size=4, max_model_len=60, max_num_seqs=3, max_num_batched_tokens=100
    )
    for i, length in enumerate(lengths):
        scheduler.add(Sequence(i, SamplingParams(), np.full(4, i, np.int32), end=4 + length))
    if reorder:
        scheduler.sort_waiting_longest_first()
    count = 0
    while (step := scheduler.schedule()) is not None:
        scheduler.update(step, np.ones(len(step.sampled)))
        count += 1
    assert not scheduler.unfinished
    return count


def test_longest_first_leaves_no_long_sequence_alone_at_the_end():
    """Nine outputs of 5 tokens and one of 45, on three rows."""
    lengths = [5] * 9 + [45]
    assert steps_of(lengths, reorder=True) == 45
    assert steps_of(lengths, reorder=False) == 3 * 5 + 45
    assert steps_of([7, 7, 7], reorder=True) == steps_of([7, 7, 7], reorder=False) == 7


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7))
@settings(deadline=None, max_examples=50)
def test_longest_first_is_within_four_thirds_of_the_best_order(lengths):
    """Graham's bound for longest processing time first (1969): 4/3 - 1/(3 rows) of the optimum,
    found by trying all.
    """
    rows = 3
    best = min(
        max(sum(n for n, at in zip(lengths, row_of) if at == row) for row in range(rows))
        for row_of in product(range(rows), repeat=len(lengths))
    )
    assert best <= steps_of(lengths, reorder=True) <= (4 / 3 - 1 / (3 * rows)) * best + 1e-9


def mixed_steps(trace: Trace) -> list[int]:
    """The numbers of the steps that hold a prompt."""
    return [i for i, (_, batch) in enumerate(trace.steps) if batch.attention.num_prefills]


def test_prompts_enter_in_groups_when_rows_are_scarce():
    """Four rows, and each step one sequence ends. A group of two enters every second step."""
    requests = [
        Request(plain(4, stem=i % 2), max_tokens=2 + min(i, 3), ignore_eos=True, same_seed=False)
        for i in range(24)
    ]
    alone = run(*requests, max_num_seqs=4, caching=False)
    groups = run(*requests, max_num_seqs=4, caching=False, admission_group=2)
    assert len(mixed_steps(alone)) > 0.6 * len(alone.steps)
    assert len(mixed_steps(groups)) < 0.6 * len(mixed_steps(alone))
    for seq, other in zip(alone.seqs, groups.seqs):
        assert seq.token_ids.tolist() == other.token_ids.tolist()


def test_a_group_waits_eight_steps_at_most():
    """The second sequence ends after two tokens, and the first and third are long."""
    long = Request(plain(4), max_tokens=26, ignore_eos=True)
    short = Request(plain(4, stem=1), max_tokens=2, ignore_eos=True)
    requests = [long, short, long, long]
    config = {"max_num_seqs": 2, "caching": False}
    assert mixed_steps(run(*requests, **config))[:2] == [0, 2]
    waited = run(*requests, **config, admission_group=2)
    assert mixed_steps(waited)[:2] == [0, ADMISSION_STEPS]


def test_the_last_waiting_sequences_wait_for_no_group():
    """As many rows are free as sequences wait, so the rows are not scarce."""
    short = Request(plain(4, stem=1), max_tokens=2, ignore_eos=True)
    long = Request(plain(4), max_tokens=20, ignore_eos=True)
    trace = run(long, short, long, max_num_seqs=2, caching=False, admission_group=2)
    assert mixed_steps(trace) == [0, 2]


def test_sampling_that_needs_the_last_token_waits_for_it():
    trace = run(
        Request(plain(3), max_tokens=9, ignore_eos=True, needs_previous_token=True), overlap=True
    )
    assert all((batch.tokens.ids != PENDING).all() for _, batch in trace.steps)


def test_what_was_begun_before_a_reset_is_not_hit_after_it():
    """The second computes the whole prompt, although the first still runs on the block it began
    before the reset.
    """
    first = Request(plain(3), max_tokens=20, ignore_eos=True)
    trace = run(
        first, Request(plain(9), arrival=10), Request(plain(9), arrival=20), resets=frozenset({1})
    )
    assert [seq.num_cached_tokens for seq in trace.seqs] == [0, 0, 8]


def test_a_cache_of_one_sequence_serves_any_number_of_them():
    requests = [
        Request(plain(15, stem=i % 2), max_tokens=17, ignore_eos=True, same_seed=False)
        for i in range(12)
    ]
    run(*requests, spare_blocks=0, spare_tokens=0, overlap=True)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_thousand_requests_are_scheduled_without_a_model(overlap):
    rng = np.random.default_rng(0)
    requests = [
        Request(
            prompt=plain(rng.integers(1, 100), stem=rng.integers(2)) + (i % 7,) * 20,
            max_tokens=int(rng.integers(1, 40)),
            arrival=i // 20,
        )
        for i in range(1000)
    ]
    config = {
        "block_size": 16,
        "max_model_len": 160,
        "max_num_seqs": 64,
        "spare_blocks": 90,
        "spare_tokens": 192,
    }
    trace = run(*requests, **config, overlap=overlap)
    assert trace.scheduler.stats.num_preemptions > 0
    assert trace.scheduler.stats.prefix_cache_hits > 0


# -- the packed batch ------------------------------------------------------------------------------


def leaves(batch: Batch[np.ndarray]) -> dict[str, np.ndarray | int]:
    """All arrays and numbers of a batch by their names."""
    found = {}
    required = {"tokens": batch.tokens, "attention": batch.attention, "sample": batch.sample}
    for name, part in {**required, **batch.parts}.items():
        found.update({f"{name}.{key}": value for key, value in vars(part).items()})
    return found


def test_a_batch_survives_its_journey_through_one_buffer():
    config = Config()
    abilities: list[Ability] = [*sampling_abilities(), PromptLogprobs()]
    scheduler = config.scheduler(
        {name: kind for ability in abilities for name, kind in ability.columns.items()}
    )
    processor = InputProcessor(
        None,
        vocab_size=VOCAB,
        eos_token_ids=frozenset({EOS}),
        max_model_len=config.max_model_len,
        seed=0,
        abilities=abilities,
    )
    params = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=3,
        presence_penalty=0.5,
        logit_bias={3: -1.5},
        allowed_token_ids=[3, 4],
        min_tokens=2,
        logprobs=2,
        prompt_logprobs=1,
    )
    for i in range(3):
        asked = [params, SamplingParams(temperature=0)][i % 2]
        (seq,) = processor.process(str(i), list(plain(5 + i)), asked, max_logprobs=20).seqs
        scheduler.add(seq)
    batch, failures = build_batch(
        scheduler.table, scheduler.schedule(), config.block_size, abilities
    )
    assert not failures
    unused = {"bad_words", "engine_processors", "request_processors"}
    assert set(batch.parts) == {ability.name for ability in abilities} - unused
    buffer, layout = pack(batch)
    assert buffer.dtype == np.int32
    expected, found = leaves(batch), leaves(unpack(layout, buffer.copy(), np.float32))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert type(found[name]) is type(value)
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_the_uniform_numbers_are_splitmix64():
    """Against the outputs for seed 1234567 that are published as test vectors of splitmix64."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    ours = uniform(np.full(5, 1234567, np.uint64), np.arange(1, 6, dtype=np.int32))
    assert ours.dtype == np.float32
    assert ours.tolist() == [(x >> 40) / 2**24 for x in published]


def test_the_hosts_half_knows_no_torch():
    """Promise 2: scheduler, pages, tables and batches import nothing of the device's half."""
    names = [f"core.{name}" for name in ("ability", "batch", "request", "sequence", "step")]
    files = "batch_builder block_manager detokenizer input_processor output_processor scheduler"
    names += [f"engine.{name}" for name in files.split()]
    foreign = ["runner", "attention", "layers", "models", "kernels"]
    code = "\n".join(
        [
            "import sys",
            *(f"import nanovllm.{name}" for name in names),
            f"foreign = ('torch', *(f'nanovllm.{{name}}' for name in {foreign}))",
            "found = [name for name in sys.modules if name.startswith(foreign)]",
            "assert not found, found",
        ]
    )
    folder = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder
    )
    assert result.returncode == 0, result.stderr
