"""What CUDA graphs need that is not CUDA: sizes, padding, and the static memory they read, proved on the CPU.

Here nothing is recorded: the functions that a GPU would record run again on the same static tensors at each replay, so a
stale or misplaced input gives other tokens than transformers'. tests/gpu has the recording itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tiny import WAYS, greedy, make_llm, nothing_is_left, random_prompts, shared_model  # noqa: F401

from nanovllm import LLM, SamplingParams
from nanovllm.core.ability import ModelFacts
from nanovllm.core.batch import Batch
from nanovllm.core.sequence import Sequence
from nanovllm.engine.batch_builder import build_batch
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.scheduler import Scheduler
from nanovllm.parallel import TensorParallel
from nanovllm.runner import memory, sleep
from nanovllm.runner.cuda_graphs import (
    NEVER_ENDED,
    CaptureError,
    DecodeGraphs,
    capture,
    graph_size,
    graph_sizes,
    is_decode,
)
from nanovllm.runner.decode_inputs import DecodeInputs
from nanovllm.runner.pieces import piece_sizes
from nanovllm.runner.readouts.prompt_logprobs import PromptLogprobs, PromptLogprobsPart
from nanovllm.runner.setup import Setup
from nanovllm.sampling.filters import FILTERS_OFF, Filters, FiltersPart
from nanovllm.sampling.sampler import sampling_abilities

ABILITIES = [*sampling_abilities(), PromptLogprobs()]
FILTERS = Filters()
FACTS = ModelFacts(vocab_size=100, eos_token_ids=frozenset(), encode=lambda text: [])


def test_sizes_are_1_2_4_8_then_steps_of_16_then_of_32_up_to_the_most_sequences():
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(16) == [1, 2, 4, 8, 16]
    assert graph_sizes(50) == [1, 2, 4, 8, 16, 32, 48, 50]
    assert graph_sizes(256) == [1, 2, 4, 8, *range(16, 257, 16)]
    assert graph_sizes(1000) == [1, 2, 4, 8, *range(16, 256, 16), *range(256, 1000, 32), 1000]


@given(st.integers(1, 600), st.data())
def test_a_batch_gets_the_smallest_size_that_holds_it(most, data):
    sizes = graph_sizes(most)
    count = data.draw(st.integers(1, most))
    assert graph_size(count, sizes) == min(size for size in sizes if size >= count)


# -- batches of a real scheduler ---------------------------------------------------------------------------------------


def batches(
    params: list[SamplingParams], prompt_len: int = 5, steps: int = 4
) -> list[Batch[np.ndarray]]:
    """Of one sequence for each params, from the first step on; the tokens sampled are 7, and known a step late."""
    scheduler = Scheduler(
        num_blocks=64,
        block_size=4,
        max_model_len=32,
        max_num_seqs=16,
        max_num_batched_tokens=prompt_len * len(params),
        columns={name: dtype for ability in ABILITIES for name, dtype in ability.columns.items()},
    )
    processor = InputProcessor(
        None,
        vocab_size=100,
        eos_token_ids=frozenset(),
        max_model_len=30,
        seed=0,
        abilities=ABILITIES,
    )
    for i, p in enumerate(params):
        request = processor.process(str(i), np.arange(prompt_len) + i, p, max_logprobs=20)
        scheduler.add(*request.seqs)
    made = []
    for _ in range(steps):
        step = scheduler.schedule()
        made.append(build_batch(scheduler.table, step, 4, ABILITIES)[0])
        scheduler.update(step, np.full(len(step.sampled), 7))
    return made


def test_only_steps_of_one_sampled_token_a_sequence_are_decode_steps():
    first, *others = batches([SamplingParams(max_tokens=9)] * 3)
    assert not is_decode(first)
    assert all(map(is_decode, others))
    # The budget holds 4 tokens: the last step of a prompt of 9 computes one token, and so does a chunk before its end.
    scheduler = Scheduler(
        num_blocks=64, block_size=4, max_model_len=32, max_num_seqs=16, max_num_batched_tokens=4
    )
    for i, prompt_len in enumerate([1, 1, 1, 9]):
        scheduler.add(Sequence(i, SamplingParams(), np.arange(prompt_len, dtype=np.int32), end=30))
    batch, _ = build_batch(scheduler.table, scheduler.schedule(), 4)
    assert batch.attention.max_query_len == 1
    assert not is_decode(batch), "the fourth sequence has a token computed and none sampled"
    asked = others[0]
    asked.parts["prompt_logprobs"] = PromptLogprobsPart(
        np.zeros(1, np.int32), np.zeros(1, np.int32), 0
    )
    assert not is_decode(asked), (
        "logprobs of prompt tokens come from logits that graphs do not keep"
    )


@pytest.mark.parametrize(
    ("extra", "inside"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"top_p": 0.9}, True),
        ({"top_k": 3}, True),
        ({"min_p": 0.1}, True),
        ({"top_p": 0.9, "logprobs": 2}, False),
        ({"logit_bias": {1: 5.0}}, False),
        ({"allowed_token_ids": [1, 2]}, False),
        ({"presence_penalty": 0.5}, False),
    ],
)
def test_temperatures_and_filters_are_sampled_inside_a_graph(extra, inside):
    *_, batch = batches([SamplingParams(), SamplingParams(**extra)])
    graphs = DecodeGraphs(make_llm().llm_engine.setup)
    assert graphs.can_sample(batch) is (not batch.parts), "the plain definition cannot be recorded"
    graphs.parts = {"filters"}
    assert graphs.can_sample(batch) is inside


def check_rows(inputs: DecodeInputs[np.ndarray], batch: Batch[np.ndarray], size: int) -> None:
    """A batch's rows are what it says, and those after it read one token and write nowhere."""
    count, width = batch.attention.block_tables.shape
    said = {
        "token_ids": batch.tokens.ids,
        "positions": batch.attention.positions,
        "slot_mapping": batch.attention.slot_mapping,
        "token_rows": batch.tokens.rows,
        "context_lens": batch.attention.context_lens,
    }
    for name, column in said.items():
        np.testing.assert_array_equal(inputs.columns[name][:count], column, err_msg=name)
    np.testing.assert_array_equal(inputs.tables[:count, :width], batch.attention.block_tables)
    for name in ("temperature", "uniform"):
        expected = np.zeros(size, np.float32)
        expected[: len(batch.sample.temperature)] = getattr(batch.sample, name)
        np.testing.assert_array_equal(inputs.columns[name][:size], expected, err_msg=name)
    filters = batch.parts.get("filters")
    for name, off in FILTERS_OFF.items():
        expected = np.full(size, off, np.float32)
        if isinstance(filters, FiltersPart):
            expected[filters.at] = getattr(filters, name)
        np.testing.assert_array_equal(inputs.columns[name][:size], expected, err_msg=name)
    assert (inputs.columns["slot_mapping"][count:size] == -1).all()
    assert (inputs.columns["context_lens"][count:size] == 1).all()
    assert (inputs.columns["token_rows"][count:size] == len(inputs.tables)).all()
    assert (inputs.columns["token_ids"][count:size] >= 0).all(), (
        "a pending token would be read from the spare row"
    )


def inputs_of(max_num_seqs: int, max_blocks: int) -> DecodeInputs[np.ndarray]:
    made = DecodeInputs(
        np.empty(DecodeInputs.size(max_num_seqs, max_blocks), np.int32),
        max_num_seqs,
        max_blocks,
        np.float32,
    )
    made.clear()
    return made


def test_greedy_rows_become_draws_at_temperature_0_and_padding_writes_nowhere():
    temperatures = [0.0, 0.7, 0.0, 1.3, 0.2]
    *_, batch = batches([SamplingParams(temperature=t) for t in temperatures])
    host = inputs_of(16, 8)
    host.update(batch, 8)
    check_rows(host, batch, 8)
    np.testing.assert_array_equal(
        host.columns["temperature"][:8], np.float32([*temperatures, 0, 0, 0])
    )


def test_of_a_step_like_the_one_before_only_new_blocks_travel():
    """Blocks of 4, prompts of 5, all greedy: positions, contexts and slots are foreseen inside a block."""
    host, sent = inputs_of(16, 8), []
    for batch in batches([SamplingParams(temperature=0)] * 3, prompt_len=5, steps=12)[1:]:
        places, _ = host.update(batch, 4)
        host.advance(4)
        sent.append(len(places))
    # The host knows each token before it plans the next (no overlap here), so three token ids travel at first; all are 7.
    # Positions 8, 12, ... begin a block: its table entry and slot travel, for each of three sequences.
    assert sent[1:] == [6 if position % 4 == 0 else 0 for position in range(6, 16)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_device_that_gets_the_changes_alone_has_every_batch(data):
    """Over arrivals, ends, preemptions, mixed steps that the device does not advance in, and graph sizes up and down."""
    most, block_size, max_len = data.draw(st.sampled_from([3, 8, 21])), 4, 40
    max_blocks = max_len // block_size
    scheduler = Scheduler(
        num_blocks=data.draw(st.sampled_from([12, 40, 200])),
        block_size=block_size,
        max_model_len=max_len,
        max_num_seqs=most,
        max_num_batched_tokens=32,
        columns=FILTERS.columns,
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for i in range(data.draw(st.integers(1, 30))):
        prompt = rng.integers(0, 50, rng.integers(1, 20)).astype(np.int32)
        params = SamplingParams(
            temperature=float(rng.choice([0, 0.7])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1, 0.5])),
            max_tokens=20,
            seed=i,
        )
        seq = Sequence(i, params, prompt, end=int(len(prompt) + rng.integers(1, 20)), seed=i)
        prepared = FILTERS.prepare(params, FACTS)
        if prepared is not None:
            seq.abilities = 1
            seq.prepared = {"filters": prepared}
        scheduler.add(seq)
    host, device, sizes, seen = (
        inputs_of(most, max_blocks),
        inputs_of(most, max_blocks),
        graph_sizes(most),
        0,
    )
    overlap, in_flight = data.draw(st.booleans()), None
    while scheduler.unfinished:
        step = scheduler.schedule()
        if step is not None:
            batch, _ = build_batch(scheduler.table, step, block_size, [FILTERS])
            if is_decode(batch):
                size = graph_size(len(batch.attention.context_lens), sizes)
                places, values = host.update(batch, size)
                assert len(np.unique(places)) == len(places)
                device.flat[places] = values
                check_rows(device, batch, size)
                device.advance(size)
                host.advance(size)
                np.testing.assert_array_equal(host.flat, device.flat)
                seen += 1
        for done in [in_flight, None if overlap else step]:
            if done is not None:
                scheduler.update(done, rng.integers(0, 50, len(done.sampled)))
        in_flight = step if overlap else None
    event(f"decode steps: {min(seen, 20)}")


# -- the static path, unrecorded ---------------------------------------------------------------------------------------


class Replayed(DecodeGraphs):
    """Counts replays. Tokens are copied, as on a GPU the copy to the host does before the next step."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.parts = {"filters"}
        self.sizes_replayed: list[int] = []
        self.sampled = 0
        self.parts_sampled: set[str] = set()

    def _forward(self, batch):
        self.sizes_replayed.append(graph_size(len(batch.attention.context_lens), self.sizes))
        return super()._forward(batch)

    def next_tokens(self, batch):
        self.sampled += 1
        self.parts_sampled |= batch.parts.keys()
        return super().next_tokens(batch).clone()


def with_static_path(llm: LLM) -> Replayed:
    runner = llm.llm_engine.executor.runner
    graphs = Replayed(runner.setup)
    with torch.inference_mode():
        for size in graphs.sizes:
            graphs.record(
                size,
                runner.forward,
                lambda hidden, batch: runner.next_tokens.sample(runner.model.logits(hidden), batch),
            )
    runner.graphs = graphs
    return graphs


def outputs(llm: LLM, prompts: list[list[int]], params: object) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("backend", ["torch", None])
def test_greedy_tokens_equal_transformers(backend, overlap):
    _, model = shared_model()
    prompts = random_prompts([1, 15, 16, 17, 100, 33, 5, 70, 3, 9, 40])
    lengths = [20, 3, 25, 11, 22, 1, 8, 14, 16, 17, 6]  # batches shrink through all sizes
    expected = [greedy(model, prompt, n) for prompt, n in zip(prompts, lengths)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    llm = make_llm(
        attention_backend=backend,
        async_scheduling=overlap,
        max_num_seqs=20,
        max_num_batched_tokens=64,
    )
    graphs = with_static_path(llm)
    assert outputs(llm, prompts, params) == expected
    assert outputs(llm, prompts, params) == expected, "on prefix hits"
    assert {1, 2, 4, 8, 16} <= set(graphs.sizes_replayed)


# Greedy, temperature and every filter, alone and together; neighbours differ.
MIXED = [
    {},
    {"top_k": 3},
    {"temperature": 0.0},
    {"top_p": 0.5, "temperature": 0.8},
    {"min_p": 0.3, "seed": 4},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 1.5},
    {"temperature": 0.6, "seed": 5},
]


def mixed_rows(longest: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and params. The batches shrink from 7 rows to 1, so graphs have padding rows."""
    params = [
        SamplingParams(max_tokens=longest - i, ignore_eos=True, **way)
        for i, way in enumerate(MIXED)
    ]
    return random_prompts([12, 20, 5, 33, 8, 17, 2]), params


def check_static_path(
    prompts: list[list[int]], params: list[SamplingParams], expected: object, overlap: bool
) -> None:
    llm = make_llm(async_scheduling=overlap, max_num_seqs=8)
    graphs = with_static_path(llm)
    assert outputs(llm, prompts, params) == expected
    assert graphs.sampled == len(graphs.sizes_replayed) >= 8, "no step sampled outside"
    plain = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    assert outputs(llm, prompts, plain) == outputs(make_llm(), prompts, plain), "off again"


@pytest.mark.parametrize("overlap", [False, True])
def test_filters_inside_a_graph_give_the_tokens_of_the_eager_path(overlap):
    prompts, params = mixed_rows(24)
    expected = outputs(make_llm(max_num_seqs=8), prompts, params)
    check_static_path(prompts, params, expected, overlap)


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_sequences_give_the_same_tokens(overlap):
    _, model = shared_model()
    prompts = random_prompts([7, 30, 16, 45, 21, 1, 32, 50], seed=3)
    expected = [greedy(model, prompt, 40) for prompt in prompts]
    llm = make_llm(
        num_gpu_blocks_override=12, max_model_len=100, max_num_seqs=8, async_scheduling=overlap
    )
    graphs = with_static_path(llm)
    assert (
        outputs(llm, prompts, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        == expected
    )
    assert llm.llm_engine.scheduler.stats.num_preemptions > 3
    assert len(graphs.sizes_replayed) > 20


@pytest.mark.parametrize("overlap", [False, True])
def test_any_sampling_gives_the_tokens_of_the_eager_path(overlap):
    """Temperatures and filters inside a graph; everything else samples eagerly from its hidden states."""
    prompts = random_prompts([12, 20, 5, 33, 8, 17, 2])
    ways = WAYS[:7]
    # The plain ones outlive the others, so both kinds of step occur.
    params = [
        SamplingParams(max_tokens=24 - 3 * i, ignore_eos=True, **way) for i, way in enumerate(ways)
    ]
    eager = make_llm(async_scheduling=overlap, max_num_seqs=8)
    static = make_llm(async_scheduling=overlap, max_num_seqs=8)
    graphs = with_static_path(static)
    found, expected = (llm.generate(prompts, params, use_tqdm=False) for llm in (static, eager))
    assert [out.outputs[0].token_ids for out in found] == [
        out.outputs[0].token_ids for out in expected
    ]
    assert found[4].outputs[0].logprobs == expected[4].outputs[0].logprobs
    assert len(graphs.sizes_replayed) > 20


def test_a_step_that_ends_half_way_leaves_no_stale_inputs():
    """The host can no longer know what the device has: the next step sends all."""
    _, model = shared_model()
    prompts = random_prompts([9, 20, 14])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm = make_llm(max_num_seqs=4)
    graphs = with_static_path(llm)
    forward, head = graphs.graphs[4]

    def failing() -> None:
        forward()
        raise KeyboardInterrupt

    graphs.graphs[4] = failing, head
    with pytest.raises(KeyboardInterrupt):
        outputs(llm, prompts, params)
    graphs.graphs[4] = forward, head
    assert outputs(llm, prompts, params) == [greedy(model, prompt, 12) for prompt in prompts]


# -- recording, with what stands for torch.cuda ------------------------------------------------------------------------


class PretendedCuda:
    """Notes what `capture` asks of torch; names and arguments are as in torch 2.8 to 2.13."""

    device_index, device = 0, torch.device("cuda", 0)  # of the stream, which is this object too

    def __init__(self, monkeypatch: pytest.MonkeyPatch, end_fails: bool = False) -> None:
        self.did: list[str] = []
        self.end_fails = end_fails
        for owner, name, function in [
            (torch.cuda, "CUDAGraph", lambda: self),
            (torch.cuda, "default_generators", (self,)),
            (torch.cuda, "stream", self.on),
            (torch.cuda, "synchronize", lambda device: self.did.append("synchronize")),
            (torch.cuda, "empty_cache", lambda: self.did.append("empty cache")),
            (torch._C, "_cuda_clearCublasWorkspaces", lambda: self.did.append("clear workspaces")),
            (
                torch._C,
                "_cuda_endAllocateToPool",
                lambda device, pool: self.did.append(f"end {pool}"),
            ),
            (
                torch._C,
                "_cuda_releasePool",
                lambda device, pool: self.did.append(f"release {pool}"),
            ),
        ]:
            monkeypatch.setattr(owner, name, function, raising=False)

    @contextmanager
    def on(self, stream: object) -> Iterator[None]:
        assert stream is self
        yield

    def synchronize(self) -> None:
        self.did.append("stream ready")

    def clone_state(self) -> str:
        return "state"

    def graphsafe_set_state(self, state: str) -> None:
        self.did.append(f"set {state}")

    def capture_begin(self, pool: str, capture_error_mode: str) -> None:
        self.did.append(f"begin {pool}, {capture_error_mode}, {torch.is_inference_mode_enabled()}")

    def capture_end(self) -> None:
        self.did.append("end")
        if self.end_fails:
            raise RuntimeError("the capture is invalid")

    def replay(self) -> None:
        self.did.append("replay")

    def reset(self) -> None:
        self.did.append("reset")


@pytest.mark.parametrize("largest", [True, False])
def test_a_graph_is_recorded_once_its_work_has_run(monkeypatch, largest):
    cuda = PretendedCuda(monkeypatch)
    with torch.inference_mode():
        replay = capture(cuda, "pool", lambda: cuda.did.append("work"), largest)
    emptied = ["empty cache"] if largest else []
    assert cuda.did == [
        "synchronize", "work", "stream ready", "clear workspaces", *emptied,
        "begin pool, thread_local, False", "work", "end", "clear workspaces",
    ]  # fmt: skip
    replay()
    assert cuda.did[-1] == "replay"


def test_dropped_graphs_are_freed_even_where_an_error_still_holds_them(monkeypatch):
    """NCCL would wait for their collectives."""
    runner = make_llm(max_num_seqs=2).llm_engine.executor.runner
    cuda = PretendedCuda(monkeypatch)
    graphs = DecodeGraphs(runner.setup)
    graphs.capture = lambda work, largest: capture(cuda, "pool", work, largest)
    for size in (2, 1):
        hidden = graphs.hidden[:size]
        graphs.record(size, lambda batch, hidden=hidden: hidden, lambda hidden, batch: hidden[:, 0])
    kept = dict(graphs.graphs)
    runner.graphs = graphs
    runner.drop_recordings()
    assert (runner.graphs, graphs.graphs, len(kept)) == (None, {}, 2)
    assert cuda.did.count("reset") == 4


def test_the_first_graph_of_a_size_is_freed_when_the_second_cannot_be_recorded(monkeypatch):
    runner = make_llm(max_num_seqs=2).llm_engine.executor.runner
    cuda = PretendedCuda(monkeypatch)
    graphs = DecodeGraphs(runner.setup)
    graphs.capture = lambda work, largest: capture(cuda, "pool", work, largest)

    def head(hidden: torch.Tensor, batch: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        graphs.record(2, lambda batch: graphs.hidden, head)
    assert cuda.did[-1] == "reset"


def test_a_rank_whose_recording_fails_takes_part_in_what_the_others_record_next():
    """Each recording runs its function once before, with the collectives of all ranks."""
    graphs = DecodeGraphs(make_llm(max_num_seqs=2).llm_engine.setup)
    ran = []

    def failing(work: Callable[[], object], largest: bool) -> Callable[[], object]:
        work()
        raise CaptureError("no memory")

    def head(hidden: torch.Tensor, batch: object) -> torch.Tensor:
        ran.append("head")
        return hidden[:, 0]

    graphs.capture = failing
    with pytest.raises(CaptureError, match="no memory"):
        graphs.record(2, lambda batch: ran.append("forward") or graphs.hidden, head)
    assert ran == ["forward", "head"]
    assert not graphs.graphs


@pytest.mark.parametrize("end_fails", [True, False])
def test_a_failed_recording_says_so_and_gives_everything_back(monkeypatch, end_fails):
    cuda, kept = PretendedCuda(monkeypatch, end_fails), len(NEVER_ENDED)

    def work() -> None:
        cuda.did.append("work")
        if cuda.did.count("work") == 2:
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(CaptureError, match="the capture is invalid" if end_fails else "no memory"):
        capture(cuda, "pool", work, False)
    assert cuda.did[-6:] == [
        "work",
        "end",
        "set state",
        "end pool",
        "release pool",
        "clear workspaces",
    ]
    assert NEVER_ENDED[kept:] == [cuda]
    NEVER_ENDED.pop()


def test_what_fails_by_itself_is_no_failed_recording(monkeypatch):
    cuda = PretendedCuda(monkeypatch)

    def work() -> None:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        capture(cuda, "pool", work, True)
    assert "begin" not in " ".join(cuda.did)


# -- what the runner does around recording -----------------------------------------------------------------------------


class Unrecorded(DecodeGraphs):
    """What a runner has on a GPU, without the CUDA stream."""

    def __init__(self, setup: Setup, stream: object) -> None:
        super().__init__(setup)
        self.stream = stream

    def next_tokens(self, batch):
        return super().next_tokens(batch).clone()


@pytest.fixture
def pretended_stream(monkeypatch):
    monkeypatch.setattr(memory, "DecodeGraphs", Unrecorded)
    return object()


def test_graphs_are_recorded_anew_after_sleep(pretended_stream):
    _, model = shared_model()
    prompts = random_prompts([9, 30, 3])
    expected = [greedy(model, prompt, 20) for prompt in prompts]
    llm = make_llm(max_num_seqs=4)
    runner = llm.llm_engine.executor.runner
    runner.capture_stream = pretended_stream
    runner.graphs = before = memory.record_graphs(runner)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    assert outputs(llm, prompts, params) == expected
    llm.sleep(1)
    assert runner.graphs is None
    llm.wake_up(["weights"])
    assert runner.graphs is None, "the cache is not back yet"
    llm.wake_up(["kv_cache"])
    assert runner.graphs not in (None, before)
    assert outputs(llm, prompts, params) == expected


def test_an_engine_whose_recording_fails_goes_on_eagerly(pretended_stream, monkeypatch, caplog):
    record, tried = Unrecorded.record, []

    def failing(self: Unrecorded, size: int, *functions: Any) -> None:
        tried.append(size)
        if size == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        record(self, size, *functions)

    monkeypatch.setattr(Unrecorded, "record", failing)
    llm = make_llm(max_num_seqs=4)
    runner = llm.llm_engine.executor.runner
    runner.capture_stream = pretended_stream
    with caplog.at_level("WARNING", "nanovllm"):
        runner.graphs = memory.record_graphs(runner)
    assert runner.graphs is None
    assert tried == [4, 2], "the largest first, and none after a failure"
    assert "recording a graph for 2 sequences failed: CUDA out of memory" in caplog.text
    _, model = shared_model()
    (prompt,) = random_prompts([9])
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    assert outputs(llm, [prompt], params) == [greedy(model, prompt, 10)]


def test_a_recording_that_fails_after_sleep_is_tried_again_after_the_next(
    pretended_stream, monkeypatch
):
    """Another process may hold the memory for a while."""
    record, has_memory = Unrecorded.record, True

    def record_with_memory(self: Unrecorded, *args: Any) -> None:
        if not has_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        record(self, *args)

    monkeypatch.setattr(Unrecorded, "record", record_with_memory)
    llm = make_llm(max_num_seqs=4)
    runner = llm.llm_engine.executor.runner
    runner.capture_stream = pretended_stream
    for has_memory in (True, False, True):
        llm.sleep(1)
        llm.wake_up()
        assert (runner.graphs is not None) is has_memory


def test_an_engine_that_could_record_nothing_at_its_start_does_not_try_again(
    pretended_stream, monkeypatch
):
    monkeypatch.setattr(memory, "record_graphs", lambda runner, count=None: None)
    runner = make_llm(max_num_seqs=4).llm_engine.executor.runner
    runner.capture_stream = pretended_stream
    assert memory.graph_bytes(runner) == 0
    assert runner.capture_stream is None


def test_what_recording_leaves_in_torch_s_cache_is_freed(pretended_stream, monkeypatch):
    done: list[object] = []
    monkeypatch.setattr(Unrecorded, "record", lambda self, size, *functions: done.append(size))
    monkeypatch.setattr(memory, "free_gpu_memory", lambda device: done.append("free"))
    runner = make_llm(max_num_seqs=4).llm_engine.executor.runner
    runner.capture_stream = pretended_stream
    memory.record_graphs(runner)
    assert done == [4, 2, 1, "free"]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3))
@settings(deadline=None)
def test_sleeping_weights_are_in_pieces_that_pinned_memory_does_not_round_up(shape):
    data = torch.randn(shape)
    pieces = sleep.powers_of_two(data.reshape(-1))
    assert all(len(piece).bit_count() == 1 for piece in pieces), "a power of two"
    assert len({len(piece) for piece in pieces}) == len(pieces)
    copies = [piece.clone() for piece in pieces]
    assert torch.equal(sleep.joined(copies, data.shape, data.device), data)


def test_one_of_several_ranks_does_not_wait_for_those_that_wait_for_it(
    pretended_stream, monkeypatch
):
    """What fails before it is recorded leaves the others inside its collectives."""

    def failing(self: Unrecorded, *args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Unrecorded, "record", failing)
    runner = make_llm(max_num_seqs=4).llm_engine.executor.runner
    runner.capture_stream = pretended_stream
    monkeypatch.setattr(runner, "tp", TensorParallel(0, 2))
    with pytest.raises(torch.OutOfMemoryError):
        memory.record_graphs(runner)


@dataclass
class FakeGPU:
    """The memory of a GPU in bytes, as the driver reports it: used by others, and used by us."""

    total: int
    others: int
    ours: int = 0

    def mem_get_info(self, device: object) -> tuple[int, int]:
        return self.total - self.others - self.ours, self.total


@pytest.mark.parametrize(
    ("others", "share"),
    [(0, 800_000), (150_000, 800_000), (500_000, 500_000 - 10_000)],
    ids=["alone", "beside others", "others leave less than our share"],
)
def test_pages_get_what_weights_the_largest_step_and_graphs_leave_of_our_share(
    monkeypatch, others, share
):
    weights, step, library, graph, more = 100_000, 60_000, 5_000, 30_000, 1_000
    piece, more_pieces = 20_000, 2_000
    llm = make_llm(max_num_seqs=50, gpu_memory_utilization=0.8)
    runner = llm.llm_engine.executor.runner
    page = runner.attention.page_bytes()
    gpu = FakeGPU(total=1_000_000, others=others)
    monkeypatch.setattr(memory, "GPU_RESERVE_BYTES", 10_000)
    for name in ("mem_get_info", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name, lambda device: None))
    used: dict[str, int] = {
        "weights": weights,
        "loading": 7_000,
    }  # "loading" and "step" are caches that torch can empty

    def use(**bytes_of: int) -> None:
        used.update(bytes_of)
        gpu.ours = sum(used.values())

    def free(device: object) -> int:
        use(loading=0, step=0)
        return gpu.mem_get_info(None)[0]

    class Graphs:
        sizes = graph_sizes(50)

        def __init__(self, runner: Any, count: int) -> None:
            use(library=library, graphs=graph + (count - 1) * more)

        def __del__(self) -> None:
            use(graphs=0)

    class Pieces:
        sizes = piece_sizes(500)

        def __init__(self, runner: Any, count: int) -> None:
            use(pieces=piece + (count - 1) * more_pieces)

        def __del__(self) -> None:
            use(pieces=0)

    def profile(runner: Any) -> int:
        assert used["loading"] == 0
        use(step=step, pages=3 * page)
        return 3

    runner.free_at_start = gpu.mem_get_info(None)[0]
    use()
    monkeypatch.setattr(memory, "free_gpu_memory", free)
    monkeypatch.setattr(memory, "profile_step", profile)
    monkeypatch.setattr(memory, "record_graphs", Graphs)
    monkeypatch.setattr(memory, "record_pieces", Pieces)
    monkeypatch.setattr(runner.attention, "allocate", lambda count: use(pages=count * page))
    graphs = graph + (len(graph_sizes(50)) - 1) * more
    pieces = piece + (len(piece_sizes(500)) - 1) * more_pieces
    expected = share - weights - step - library - graphs - pieces
    assert memory.free_gpu_bytes(runner) == expected
    assert used["pages"] == 0
