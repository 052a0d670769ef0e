"""What CUDA graphs need that is not CUDA: sizes, padding, and the static memory they read, proved on the CPU.

Here nothing is recorded: the functions that a GPU would record run again on the same static tensors at each replay, so a
stale or misplaced input gives other tokens than transformers'. tests/gpu has the recording itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import greedy, make_llm, nothing_is_left, random_prompts, shared_model  # noqa: F401

from nanovllm import LLM, SamplingParams
from nanovllm.engine.batch import Batch, build_batch
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.runner import memory
from nanovllm.runner.cuda_graphs import DecodeGraphs, graph_size, graph_sizes, is_decode, is_plain, pad_batch


def test_sizes_are_1_2_4_8_then_steps_of_16_up_to_the_most_sequences():
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(16) == [1, 2, 4, 8, 16]
    assert graph_sizes(50) == [1, 2, 4, 8, 16, 32, 48, 50]
    assert graph_sizes(256) == [1, 2, 4, 8, *range(16, 257, 16)]


@given(st.integers(1, 600), st.data())
def test_a_batch_gets_the_smallest_size_that_holds_it(most, data):
    sizes = graph_sizes(most)
    count = data.draw(st.integers(1, most))
    assert graph_size(count, sizes) == min(size for size in sizes if size >= count)


# -- batches of a real scheduler ---------------------------------------------------------------------------------------


def batches(params: list[SamplingParams], prompt_len: int = 5, steps: int = 4) -> list[Batch]:
    """Of one sequence for each params, from the first step on; the tokens sampled are 7, and known a step late."""
    scheduler = Scheduler(
        num_blocks=64, block_size=4, max_model_len=32, max_num_seqs=16, max_num_batched_tokens=prompt_len * len(params)
    )
    for i, p in enumerate(params):
        scheduler.add(Sequence(i, p, np.arange(prompt_len, dtype=np.int32) + i, end=30, seed=i))
    made = []
    for _ in range(steps):
        step = scheduler.schedule()
        made.append(build_batch(scheduler.table, step, 4, 100))
        scheduler.update(step, np.full(len(step.sampled), 7))
    return made


def test_only_steps_of_one_sampled_token_a_sequence_are_decode_steps():
    first, *others = batches([SamplingParams(max_tokens=9)] * 3)
    assert not is_decode(first)
    assert all(map(is_decode, others))
    # The budget holds 4 tokens: the last step of a prompt of 9 computes one token, and so does a chunk before its end.
    scheduler = Scheduler(num_blocks=64, block_size=4, max_model_len=32, max_num_seqs=16, max_num_batched_tokens=4)
    for i, prompt_len in enumerate([1, 1, 1, 9]):
        scheduler.add(Sequence(i, SamplingParams(), np.arange(prompt_len, dtype=np.int32), end=30))
    batch = build_batch(scheduler.table, scheduler.schedule(), 4, 100)
    assert batch.sizes[0] == 1
    assert not is_decode(batch), "the fourth sequence has a token computed and none sampled"
    asked = others[0]
    asked.prompt_at = np.zeros(1, np.int32)
    assert not is_decode(asked), "logprobs of prompt tokens come from logits that graphs do not keep"


@pytest.mark.parametrize(
    ("extra", "plain"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"top_p": 0.9}, False),
        ({"top_k": 3}, False),
        ({"min_p": 0.1}, False),
        ({"logprobs": 2}, False),
        ({"logit_bias": {1: 5.0}}, False),
        ({"allowed_token_ids": [1, 2]}, False),
        ({"presence_penalty": 0.5}, False),
    ],
)
def test_only_temperatures_are_sampled_inside_a_graph(extra, plain):
    *_, batch = batches([SamplingParams(), SamplingParams(**extra)])
    assert is_plain(batch) is plain


def test_padding_keeps_the_batch_and_adds_sequences_that_write_nowhere():
    temperatures = [0.0, 0.7, 0.0, 1.3, 0.2]
    *_, batch = batches([SamplingParams(temperature=t) for t in temperatures])
    padded = pad_batch(batch, 8, spare_row=16)
    for name in ("token_ids", "positions", "slot_mapping", "token_rows", "context_lens", "block_tables"):
        before, after = getattr(batch, name), getattr(padded, name)
        np.testing.assert_array_equal(after[:5], before, err_msg=name)
        assert after.dtype == before.dtype == np.int32
        assert len(after) == 8
    np.testing.assert_array_equal(padded.query_start, range(9))
    np.testing.assert_array_equal(padded.sample_at, range(8))
    np.testing.assert_array_equal(padded.sample_rows[:5], batch.sample_rows)
    np.testing.assert_array_equal(padded.temperature, np.float32([*temperatures, 0, 0, 0]))
    np.testing.assert_array_equal(padded.uniform[batch.random_at], batch.uniform)
    assert (padded.slot_mapping[5:] == -1).all()
    assert (padded.context_lens[5:] == 1).all()
    assert (padded.token_rows[5:] == 16).all()
    assert (padded.sample_rows[5:] == 16).all()
    assert (padded.token_ids[5:] >= 0).all(), "a pending token would be read from the spare row"
    assert not padded.block_tables[5:].any()
    assert not padded.uniform[5:].any()


# -- the static path, unrecorded ---------------------------------------------------------------------------------------


class Replayed(DecodeGraphs):
    """Counts replays. Tokens are copied, as on a GPU the copy to the host does before the next step."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.sizes_replayed: list[int] = []

    def _load(self, batch):
        self.sizes_replayed.append(graph_size(len(batch.context_lens), self.sizes))
        return super()._load(batch)

    def next_tokens(self, batch):
        return super().next_tokens(batch).clone()


def with_static_path(llm: LLM) -> Replayed:
    runner = llm.llm_engine.runner
    max_blocks = -(-runner.max_model_len // runner.args.block_size)
    graphs = Replayed(runner.max_num_seqs, max_blocks, runner.config.hidden_size, runner.dtype, runner.device)
    with torch.inference_mode():
        for size in graphs.sizes:
            graphs.record(
                size,
                lambda batch: runner.forward(batch, 1, runner.max_model_len),
                lambda hidden, batch: runner.next_tokens(runner.model.logits(hidden), batch),
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
    lengths = [20, 3, 25, 11, 20, 1, 8, 14, 20, 17, 6]  # batches shrink through all sizes
    expected = [greedy(model, prompt, n) for prompt, n in zip(prompts, lengths)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    llm = make_llm(attention_backend=backend, async_scheduling=overlap, max_num_seqs=20, max_num_batched_tokens=64)
    graphs = with_static_path(llm)
    assert outputs(llm, prompts, params) == expected
    assert outputs(llm, prompts, params) == expected, "on prefix hits"
    assert {1, 2, 4, 8, 16} <= set(graphs.sizes_replayed)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not INTERPRETED, reason="test_the_triton_backend_under_the_interpreter runs it")
def test_greedy_tokens_of_the_triton_backend_equal_transformers():
    _, model = shared_model()
    prompts = random_prompts([1, 15, 17, 40, 9])
    expected = [greedy(model, prompt, 6) for prompt in prompts]
    llm = make_llm(attention_backend="triton", async_scheduling=True, max_num_seqs=8)
    graphs = with_static_path(llm)
    assert outputs(llm, prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)) == expected
    assert graphs.sizes_replayed


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="needs triton, not yet interpreting")
def test_the_triton_backend_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "of_the_triton_backend"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_sequences_give_the_same_tokens(overlap):
    _, model = shared_model()
    prompts = random_prompts([7, 30, 16, 45, 21, 1, 32, 50], seed=3)
    expected = [greedy(model, prompt, 40) for prompt in prompts]
    llm = make_llm(num_gpu_blocks_override=12, max_model_len=100, max_num_seqs=8, async_scheduling=overlap)
    graphs = with_static_path(llm)
    assert outputs(llm, prompts, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)) == expected
    assert llm.llm_engine.scheduler.num_preemptions > 3
    assert len(graphs.sizes_replayed) > 20


@pytest.mark.parametrize("overlap", [False, True])
def test_any_sampling_gives_the_tokens_of_the_eager_path(overlap):
    """Mixed greedy and random rows inside a graph; everything else samples eagerly from its hidden states."""
    prompts = random_prompts([12, 20, 5, 33, 8, 17, 2])
    ways = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6, "seed": 4},
        {"top_p": 0.8, "top_k": 40},
        {"min_p": 0.05, "logprobs": 3},
        {"presence_penalty": 1.0, "repetition_penalty": 1.2},
        {"allowed_token_ids": list(range(50)), "logit_bias": {3: 2.0}},
    ]
    # The plain ones outlive the others, so both kinds of step occur.
    params = [SamplingParams(max_tokens=24 - 3 * i, ignore_eos=True, **way) for i, way in enumerate(ways)]
    eager = make_llm(async_scheduling=overlap, max_num_seqs=8)
    static = make_llm(async_scheduling=overlap, max_num_seqs=8)
    graphs = with_static_path(static)
    found, expected = (llm.generate(prompts, params, use_tqdm=False) for llm in (static, eager))
    assert [out.outputs[0].token_ids for out in found] == [out.outputs[0].token_ids for out in expected]
    assert found[4].outputs[0].logprobs == expected[4].outputs[0].logprobs
    assert len(graphs.sizes_replayed) > 20


# -- what the runner does around recording -----------------------------------------------------------------------------


class Unrecorded(DecodeGraphs):
    """What a runner has on a GPU, without the CUDA stream."""

    def __init__(self, *args: Any) -> None:
        *shape, self.stream = args
        super().__init__(*shape)

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
    runner = llm.llm_engine.runner
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
    runner = llm.llm_engine.runner
    runner.capture_stream = pretended_stream
    with caplog.at_level("WARNING", "nanovllm"):
        runner.graphs = memory.record_graphs(runner)
    assert runner.graphs is None
    assert tried == [4, 2], "the largest first, and none after a failure"
    assert "one of 2 sequences failed: CUDA out of memory" in caplog.text
    assert memory.record_graphs(runner) is None
    assert tried == [4, 2], "nor ever again"
    _, model = shared_model()
    (prompt,) = random_prompts([9])
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    assert outputs(llm, [prompt], params) == [greedy(model, prompt, 10)]


@dataclass
class Card:
    """A GPU's memory in bytes, as far as the driver tells: all that is in use, whoever uses it."""

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
def test_pages_get_what_weights_the_largest_step_and_graphs_leave_of_our_share(monkeypatch, others, share):
    weights, step, library, graph, more = 100_000, 60_000, 5_000, 30_000, 1_000
    llm = make_llm(max_num_seqs=50, gpu_memory_utilization=0.8)
    runner = llm.llm_engine.runner
    page = runner.attention.page_bytes()
    card = Card(total=1_000_000, others=others)
    monkeypatch.setattr(memory, "GPU_RESERVE_BYTES", 10_000)
    for name in ("mem_get_info", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(card, name, lambda device: None))
    held: dict[str, int] = {
        "weights": weights,
        "loading": 7_000,
    }  # "loading" and "step" are caches that torch can empty

    def use(**bytes_of: int) -> None:
        held.update(bytes_of)
        card.ours = sum(held.values())

    def free(runner: Any) -> int:
        use(loading=0, step=0)
        return card.mem_get_info(None)[0]

    class Graphs:
        sizes = graph_sizes(50)

        def __init__(self, runner: Any, count: int) -> None:
            use(library=library, graphs=graph + (count - 1) * more)

        def __del__(self) -> None:
            use(graphs=0)

    def profile(runner: Any) -> int:
        assert held["loading"] == 0
        use(step=step, pages=3 * page)
        return 3

    runner.free_at_start = card.mem_get_info(None)[0]
    use()
    monkeypatch.setattr(memory, "free_memory", free)
    monkeypatch.setattr(memory, "profile_step", profile)
    monkeypatch.setattr(memory, "record_graphs", Graphs)
    monkeypatch.setattr(runner.attention, "allocate", lambda count: use(pages=count * page))
    num_sizes = len(graph_sizes(50))
    assert memory.free_gpu_bytes(runner) == share - weights - step - library - graph - (num_sizes - 1) * more
    assert held["pages"] == 0
