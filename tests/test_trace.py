"""A run is recorded: `LLM(trace="run.jsonl")`. docs/trace.md describes the records.

The oracle of the records is the engine: a probe copies the state of the scheduler and of the block
manager whenever a step was scheduled, and the records are replayed against these copies. The oracle
of the outputs is an engine without a trace.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, is_typeddict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_llm, nothing_is_left, session_folder, shared_llm, shared_model  # noqa: F401
from traced_run import data_of

from nanovllm import LLM, AsyncLLM, EngineArgs, LLMEngine, SamplingParams
from nanovllm.cli import main
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.outputs import RequestOutput
from nanovllm.ray import LLMPredictor
from nanovllm.trace import records as declared_records
from nanovllm.trace import timing

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = ["the sea is the thing in her hand", "the sea is the thing in her head"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def prompts_of(page: Path) -> list[str]:
    (run,) = data_of(page.read_text())["runs"]
    return [record["prompt_text"] for record in of_kind(run["records"], "request")]


# -- examples --------------------------------------------------------------------------------------


def test_a_run_is_recorded(tmp_path: Path) -> None:
    llm = make_llm(trace=tmp_path / "run.jsonl", async_scheduling=False, block_size=16)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    expected = shared_llm().generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [each.outputs for each in outputs] == [each.outputs for each in expected]
    records = read(tmp_path / "run.jsonl")
    assert [record["kind"] for record in records] == ["run", *["request"] * 2, *["step"] * 6, "end"]

    run, first, second = records[:3]
    assert run["architecture"] == "Qwen3ForCausalLM"
    assert (run["num_blocks"], run["block_size"], run["device"]) == (256, 16, "cpu")
    assert "".join(first["prompt_pieces"]) == "<s>" + PROMPTS[0]
    assert first["params"] == {"temperature": 0, "max_tokens": 6, "ignore_eos": True}

    step = records[3]
    length, cached = len(second["prompt"]), 16  # the prompts share their first block
    assert step["admitted"][1]["cached"] == cached
    assert step["seqs"] == [
        {"seq": 0, "start": 0, "count": len(first["prompt"]), "kind": "prefill", "samples": True},
        {"seq": 1, "start": cached, "count": length - cached, "kind": "prefill", "samples": True},
    ]
    assert step["tables"]["0"][0] == step["tables"]["1"][0]
    assert step["budget"] == {"used": len(first["prompt"]) + length - cached, "max": 256}
    assert [token["id"] for token in step["tokens"]] == [
        output.outputs[0].token_ids[0] for output in outputs
    ]
    assert {one["kind"] for one in records[4]["seqs"]} == {"decode"}
    assert records[-1]["finished"] == [{"seq": i, "reason": "length"} for i in range(2)]
    assert records[-1]["stats"]["generation_tokens"] == 12


def test_logprobs_are_those_of_the_outputs(tmp_path: Path) -> None:
    llm = make_llm(trace=str(tmp_path / "run.jsonl"))
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3)
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    tokens = [
        token for step in of_kind(read(tmp_path / "run.jsonl"), "step") for token in step["tokens"]
    ]
    assert len(tokens) == 4
    for token, entry in zip(tokens, output.outputs[0].logprobs):
        assert token["logprob"] == pytest.approx(entry[token["id"]].logprob, abs=1e-5)
        by_rank = sorted(entry.values(), key=lambda one: one.rank)[:3]
        for (text, _), one in zip(token["top"], by_rank):
            # A token that ends inside a character adds no text. The record shows it alone.
            assert text == one.decoded_token or not one.decoded_token
        assert [value for _, value in token["top"]] == pytest.approx(
            [one.logprob for one in by_rank], abs=1e-5
        )


def test_chrome_trace_events(tmp_path: Path) -> None:
    llm = make_llm(trace=tmp_path / "run.json")
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans = [
        (names[e["pid"]], e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"
    ]
    count = Counter((process, name.split()[0]) for process, _, name, *_ in spans)
    assert count["device", "step"] == count["host", "schedule"] == count["host", "output"] == 6
    assert count["sequences", "prefill"] == 2
    assert count["sequences", "decode"] == 10
    ends: dict[tuple[str, int], float] = {}
    for process, row, _, start, duration in spans:  # the spans of a row follow one another
        assert start >= ends.get((process, row), 0) - 2, "rounded to microseconds"
        ends[process, row] = start + duration


def test_a_page_is_complete_after_each_call(tmp_path: Path) -> None:
    llm = make_llm(trace=tmp_path / "run.html")
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    first = prompts_of(tmp_path / "run.html")
    llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    assert first == PROMPTS[:1]
    assert prompts_of(tmp_path / "run.html") == PROMPTS[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]


def test_lines_are_written_step_by_step(tmp_path: Path) -> None:
    llm = make_llm(trace=tmp_path / "run.jsonl", async_scheduling=False)
    for number, _ in enumerate(llm.stream(PROMPTS[0], GREEDY)):
        assert len(of_kind(read(tmp_path / "run.jsonl"), "step")) == number + 1


def test_an_asynchronous_engine_is_recorded(tmp_path: Path) -> None:
    args = EngineArgs(shared_model()[0], trace=tmp_path / "run.jsonl", num_gpu_blocks_override=64)

    async def answer() -> list[RequestOutput]:
        llm = AsyncLLM.from_engine_args(args)
        try:
            return [output async for output in llm.generate(PROMPTS[0], GREEDY, "name")]
        finally:
            llm.shutdown()

    output = asyncio.run(answer())[-1]
    records = read(tmp_path / "run.jsonl")
    assert records[1]["request"] == "name"
    assert texts_of(records) == {0: output.outputs[0].text}


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    more = ["--max-tokens", "4", "--logprobs", "2", "--num-gpu-blocks-override", "64"]
    prompts = ["-p", PROMPTS[0], "-p", PROMPTS[1]]
    main(["trace", "--model", shared_model()[0], *prompts, "-o", str(path), *more])
    records = read(path)
    assert [r["prompt_text"] for r in of_kind(records, "request")] == PROMPTS
    assert {len(t["top"]) for step in of_kind(records, "step") for t in step["tokens"]} == {2}
    shown = capsys.readouterr()
    texts = texts_of(records)
    assert shown.out == "".join(f"{p}{texts[i]}\n" for i, p in enumerate(PROMPTS))
    assert "run.jsonl is written" in shown.err


def test_numbers_that_json_has_not_are_null(tmp_path: Path) -> None:
    llm = make_llm(trace=tmp_path / "run.jsonl", logprobs_mode="processed_logprobs")
    biases = {256: float("-inf")}
    params = SamplingParams(
        max_tokens=2, allowed_token_ids=[256, 257], logprobs=3, logit_bias=biases
    )
    llm.generate(PROMPTS[0], params, use_tqdm=False)
    text = (tmp_path / "run.jsonl").read_text()
    assert "Infinity" not in text
    (first, *_) = [
        t for step in of_kind(read(tmp_path / "run.jsonl"), "step") for t in step["tokens"]
    ]
    assert [value is None for _, value in first["top"]] == [False, True, True]
    assert of_kind(read(tmp_path / "run.jsonl"), "request")[0]["params"]["logit_bias"] == str(
        biases
    )


def test_the_document_names_every_field() -> None:
    document = (Path(__file__).parent.parent / "docs" / "trace.md").read_text()
    words = set(re.findall(r"`\"?(\w+)", document))
    declared = [each for each in vars(declared_records).values() if is_typeddict(each)]
    assert declared_records.StepRecord in declared
    fields = {name for each in declared for name in each.__annotations__}
    assert fields - {"kind"} <= words


def test_a_file_of_requests_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "the sea"}\n{"prompt": "the sky"}\n')
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    more = ["--trace", str(tmp_path / "run.jsonl"), "--num-gpu-blocks-override", "64"]
    main(["run-batch", "--model", shared_model()[0], *files, *more, "--no-progress"])
    run = read(tmp_path / "run.jsonl")
    assert {r["prompt_text"] for r in of_kind(run, "request")} == {"the sea", "the sky"}
    assert run[-1]["kind"] == "end"


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trace": "run.txt"}, r"trace='run.txt' must end in .html .*, .jsonl .* or .json"),
        ({"trace": "run"}, "must end in"),
        ({"trace": "run.html", "data_parallel_size": 2}, "a trace records one engine"),
        (
            {"trace": "run.html", "distributed_executor_backend": "external_launcher"},
            "all processes would write",
        ),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineArgs("m", **arguments)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="path of a file"):
        EngineArgs("m", trace=True)
    with pytest.raises(ValueError, match="use LLM or AsyncLLM"):
        LLMEngine(EngineArgs(shared_model()[0], trace=str(tmp_path / "run.html")))
    for ending in ("jsonl", "html", "json"):
        with pytest.raises(FileNotFoundError, match=r"^trace=.*: there is no folder .*nowhere'$"):
            make_llm(trace=tmp_path / "nowhere" / f"run.{ending}")
    with pytest.raises(ValueError, match="several engines"):
        LLMPredictor({"model": "m", "trace": "run.html"})


def test_without_a_trace_nothing_of_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("nanovllm.trace")]:
        monkeypatch.delitem(sys.modules, name)
    llm = make_llm(num_gpu_blocks_override=32)
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert not [name for name in sys.modules if name.startswith("nanovllm.trace")]
    scheduler = llm.llm_engine.scheduler
    assert type(llm.llm_engine) is LLMEngine
    assert type(scheduler) is Scheduler
    assert type(scheduler.blocks) is BlockManager
    assert type(scheduler.blocks.cached) is dict
    assert not vars(llm.llm_engine.executor).keys() - {"runner", "num_blocks"}


# -- the records against the engine ----------------------------------------------------------------


@dataclass
class Replay:
    """What the records say of the engine's state, record by record."""

    num_blocks: int
    refs: list[int] = field(default_factory=list)
    findable: dict[int, str] = field(default_factory=dict)  # block -> hash
    tables: dict[int, list[int]] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    unfinished: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.refs = [0] * self.num_blocks

    def apply(self, record: dict[str, Any]) -> None:
        if record["kind"] == "request":
            self.unfinished |= set(record["seqs"])
        if record["kind"] not in ("step", "end"):
            return
        if record.get("reset"):
            self.refs = [0] * self.num_blocks
            self.findable.clear()
            self.tables.clear()
            self.running.clear()
        for event in record["blocks"]:
            self.apply_event(**event)
        ended = {finish["seq"] for finish in record["finished"]}
        self.running |= {admission["seq"] for admission in record["admitted"]}
        self.running -= {*ended, *record["preempted"]}
        self.unfinished -= ended
        for seq in {*ended, *record["preempted"]}:
            self.tables.pop(seq, None)
        self.tables |= {int(seq): table for seq, table in record["tables"].items()}
        for admission in record["admitted"]:
            table = self.tables[admission["seq"]]
            assert table[: len(admission["hit"])] == admission["hit"]
        assert self.running == set(record["running"]) == self.tables.keys()
        assert self.unfinished == {*record["running"], *record["waiting"]}
        assert record["free"] == self.refs.count(0)
        assert record["cached"] == len(self.findable)

    def apply_event(
        self, event: str, block: int, refs: int, hash: str | None, start: int, **_: Any
    ) -> None:
        change = {"allocate": 1, "acquire": 1, "release": -1, "free": -1}.get(event, 0)
        self.refs[block] += change
        assert self.refs[block] == refs
        if event == "allocate":
            assert refs == 1
            assert block not in self.findable, "it was evicted before"
        elif event in ("release", "free"):
            assert (event == "free") == (refs == 0)
        elif event == "acquire":
            assert self.findable[block] == hash
        elif event == "register":
            assert hash not in self.findable.values()
            self.findable[block] = hash
        elif event == "evict":
            assert self.findable.pop(block) == hash


@dataclass
class State:
    """The state of the engine after a step was scheduled, read off its own objects."""

    number: int
    refs: list[int]
    findable: dict[int, str]
    tables: dict[int, list[int]]
    running: list[int]
    waiting: list[int]
    free: int
    computed: dict[int, tuple[int, int]]  # sequence -> first and last position of this step


def state_of(scheduler: Scheduler, step: Any, number: int) -> State:
    blocks, table = scheduler.blocks, scheduler.table
    prefixes = [p for p in blocks.prefixes if p is not None and blocks.cached.get(p.hash) is p]
    return State(
        number=number,
        refs=list(blocks.ref_counts),
        findable={prefix.block_id: f"{prefix.hash:016x}" for prefix in prefixes},
        tables={seq.seq_id: table.blocks_of(row) for row, seq in table.seqs.items()},
        running=[table.seqs[row].seq_id for row in scheduler.running.tolist()],
        waiting=[seq.seq_id for seq in scheduler.waiting],
        free=blocks.num_free,
        computed={
            table.seqs[row].seq_id: (start, end)
            for row, start, end in zip(step.rows.tolist(), step.starts.tolist(), step.ends.tolist())
        },
    )


class Probe:
    """Copies the state of an engine whenever a step was scheduled."""

    def __init__(self, llm: LLM) -> None:
        self.states: list[State] = []
        scheduler = llm.llm_engine.scheduler
        schedule = scheduler.schedule

        def probed() -> Any:
            step = schedule()
            if step is not None:
                self.states.append(state_of(scheduler, step, len(self.states)))
            return step

        scheduler.schedule = probed  # type: ignore[method-assign]


class Recorded:
    """An engine with a trace, a probe and a replay that goes on from run to run."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        self.path = session_folder() / f"{name}.jsonl"
        self.plain = make_llm(**kwargs)
        self.traced = make_llm(trace=self.path, **kwargs)
        self.probe = Probe(self.traced)
        self.replay = Replay(self.traced.llm_engine.executor.num_blocks)
        self.num_read = 0
        self.num_steps = 0

    def new_records(self) -> list[dict[str, Any]]:
        records = read(self.path)[self.num_read :]
        self.num_read += len(records)
        return records

    def check(self, records: list[dict[str, Any]]) -> None:
        """Every record against the state that the probe saw."""
        assert records[-1]["kind"] == "end", "no request is left"
        for record in records:
            self.replay.apply(record)
            if record["kind"] != "step":
                continue
            state = self.probe.states[self.num_steps]
            assert record["number"] == state.number == self.num_steps
            self.num_steps += 1
            assert (record["running"], record["waiting"]) == (state.running, state.waiting)
            assert self.replay.refs == state.refs
            assert self.replay.findable == state.findable
            assert self.replay.tables == state.tables
            assert record["free"] == state.free
            runs = {r["seq"]: (r["start"], r["start"] + r["count"]) for r in record["seqs"]}
            assert runs == state.computed
            assert record["budget"]["used"] == sum(end - start for start, end in runs.values())
        assert self.num_steps == len(self.probe.states)
        assert not any(self.replay.refs)


@cache
def recorded(overlap: bool, caching: bool) -> Recorded:
    """Few blocks and a small budget: prompts are cut into chunks and sequences preempted."""
    return Recorded(
        f"overlap-{overlap}-caching-{caching}",
        async_scheduling=overlap,
        enable_prefix_caching=caching,
        block_size=16,
        max_model_len=96,
        num_gpu_blocks_override=9,
        max_num_batched_tokens=24,
        max_num_seqs=4,
    )


def texts_of(records: list[dict[str, Any]]) -> dict[int, str]:
    """Sequence -> the texts of its tokens and of its end, joined."""
    texts = {seq: "" for request in of_kind(records, "request") for seq in request["seqs"]}
    for record in records:
        for token in record.get("tokens", ()):
            texts[token["seq"]] += token["text"]
        for finish in record.get("finished", ()):
            texts[finish["seq"]] += finish.get("text", "")
    return texts


def tokens_of(records: list[dict[str, Any]]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for request in of_kind(records, "request"):
        tokens |= {seq: list(request["prompt"]) for seq in request["seqs"]}
    for step in of_kind(records, "step"):
        for token in step["tokens"]:
            assert token["position"] == len(tokens[token["seq"]])
            tokens[token["seq"]].append(token["id"])
    return tokens


@dataclass
class Ask:
    """A request of the property. `abort`: before which step it is aborted."""

    prompt: list[int]
    params: dict[str, Any]
    arrival: int
    abort: int | None

    def sampling(self) -> SamplingParams:
        return SamplingParams(**self.params)


LETTERS = [*b"the sea", 200, 201, 256, 257]  # bytes, bytes of no character, tokens of words


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    start = draw(st.integers(0, 3))
    shared = (LETTERS * 8)[start : start + draw(st.sampled_from([0, 20, 36, 50]))]
    own = draw(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=12))
    temperature = draw(st.sampled_from([0.0, 1.0]))
    params = {
        "temperature": temperature,
        "seed": draw(st.integers(0, 3)),
        "n": draw(st.integers(1, 3)) if temperature else 1,
        "max_tokens": draw(st.sampled_from([1, 4, 17, 30])),
        "stop": draw(st.sampled_from([None, ["e", "the t"]])),
        "ignore_eos": draw(st.booleans()),
        "logprobs": draw(st.sampled_from([None, 1])),
    }
    arrival = draw(st.integers(0, 6))
    return Ask([*shared, *own], params, arrival, draw(st.sampled_from([None, None, 3, 9])))


def answer(llm: LLM, requests: list[Ask]) -> Iterator[RequestOutput]:
    """Runs the requests as they arrive. Yields last outputs, of aborted ones too."""
    engine = llm.llm_engine
    ahead = sorted(enumerate(requests), key=lambda each: each[1].arrival)
    now = 0
    while ahead or engine.has_unfinished_requests():
        while ahead and ahead[0][1].arrival <= now:
            i, ask = ahead.pop(0)
            engine.add_request(f"{i}", {"prompt_token_ids": ask.prompt}, ask.sampling())
        for i, ask in enumerate(requests):
            if ask.abort == now and engine.has_request(f"{i}"):
                output = engine.end_request(f"{i}")
                assert output is not None
                yield output
        yield from (output for output in engine.step() if output.finished)
        now += 1


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(asks(), min_size=1, max_size=5), caching=st.sampled_from([True, True, False])
)
def test_the_records_are_what_the_engine_did(
    overlap: bool, requests: list[Ask], caching: bool
) -> None:
    run = recorded(overlap, caching)
    expected = {output.request_id: output for output in answer(run.plain, requests)}
    outputs = {output.request_id: output for output in answer(run.traced, requests)}
    records = run.new_records()
    run.check(records)

    texts, tokens = texts_of(records), tokens_of(records)
    for record in of_kind(records, "request"):
        ask = requests[int(record["request"])]
        output = outputs[record["request"]]
        for seq, completion in zip(record["seqs"], output.outputs):
            assert texts[seq] == completion.text
            # A stop string may have ended the text before the last token.
            assert tokens[seq] == [*ask.prompt, *completion.token_ids]
        if ask.abort is None:
            assert output.outputs == expected[record["request"]].outputs


def test_preemption_chunks_hits_and_evictions_are_in_the_records() -> None:
    run = recorded(False, True)
    prompt = LETTERS * 4  # 44 tokens: two blocks are full, and 24 tokens fit into a step
    params = SamplingParams(temperature=1, seed=1, n=3, max_tokens=40, ignore_eos=True)
    run.traced.generate([{"prompt_token_ids": prompt}] * 2, params, use_tqdm=False)
    records = run.new_records()
    run.check(records)
    steps = of_kind(records, "step")
    assert any(step["preempted"] for step in steps)
    assert any(r["kind"] == "prefill" and not r["samples"] for s in steps for r in s["seqs"])
    assert any(admission["cached"] == 32 for s in steps for admission in s["admitted"])
    kinds = Counter(event["event"] for record in records for event in record.get("blocks", ()))
    assert kinds.keys() == {"acquire", "allocate", "register", "evict", "release", "free"}


def test_an_emptied_prefix_cache_is_in_the_records() -> None:
    run = recorded(True, True)
    run.traced.generate(PROMPTS, GREEDY, use_tqdm=False)
    run.traced.reset_prefix_cache()
    run.traced.generate(PROMPTS, GREEDY, use_tqdm=False)
    records = run.new_records()
    run.check(records)
    evictions = [e for r in records for e in r.get("blocks", ()) if e["event"] == "evict"]
    assert any(event["seq"] is None for event in evictions)


def test_a_closed_stream_is_in_the_records() -> None:
    run = recorded(True, True)
    stream = run.traced.stream(PROMPTS, GREEDY)
    next(stream)
    stream.close()
    aborted = run.new_records()
    run.traced.generate(PROMPTS, GREEDY, use_tqdm=False)  # a step of the stream was in flight
    run.check([*aborted, *run.new_records()])
    assert [finish["reason"] for finish in aborted[-1]["finished"]] == ["abort"] * 2


def test_an_engine_that_slept_has_an_empty_cache(tmp_path: Path) -> None:
    llm = make_llm(trace=tmp_path / "run.jsonl", num_gpu_blocks_override=32)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    llm.sleep()
    llm.wake_up()
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    replay = Replay(32)
    for record in read(tmp_path / "run.jsonl"):
        replay.apply(record)
    steps = of_kind(read(tmp_path / "run.jsonl"), "step")
    assert [step["number"] for step in steps if step.get("reset")] == [6]


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_that_raises_leaves_what_was_recorded(
    overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(
        trace=tmp_path / "run.jsonl", async_scheduling=overlap, num_gpu_blocks_override=32
    )
    runner = llm.llm_engine.executor.runner
    launch = runner.launch
    batches: list[object] = []

    def fails_third(batch: Any) -> Any:
        batches.append(batch)
        if len(batches) == 3:
            raise RuntimeError("the device is on fire")
        return launch(batch)

    monkeypatch.setattr(runner, "launch", fails_third)
    with pytest.raises(RuntimeError, match="on fire"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    records = read(tmp_path / "run.jsonl")
    assert [record["kind"] for record in records[-4:]] == ["step", "step", "step", "end"]
    assert records[-1]["error"] == "RuntimeError: the device is on fire"
    assert records[-1]["finished"] == [{"seq": i, "reason": "dropped"} for i in range(2)]
    assert records[-2]["us"]["launch"] is None

    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    records = read(tmp_path / "run.jsonl")
    replay = Replay(32)
    for record in records:
        replay.apply(record)
    assert records[-1]["error"] is None
    assert records[-1]["free"] == 32


def test_the_file_is_complete_when_the_engine_ends(tmp_path: Path) -> None:
    llm = make_llm(trace=tmp_path / "run.html", num_gpu_blocks_override=32)
    llm.enqueue(PROMPTS[0], GREEDY, use_tqdm=False)
    engine = llm.llm_engine
    assert list(tmp_path.iterdir()) == []
    engine.recorder._flush()
    engine.close()
    assert PROMPTS[0] in prompts_of(tmp_path / "run.html")
    llm.wait_for_completion(use_tqdm=False)


@pytest.mark.parametrize("ending", ["html", "json", "jsonl"])
def test_the_file_stays_as_it_is_until_something_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    path = tmp_path / f"run.{ending}"
    with pytest.raises(ValueError, match="does not exist"):
        LLM("/no/such/model", trace=path)
    assert not path.exists()
    path.write_text("an earlier run")
    with pytest.raises(ValueError, match="does not exist"):
        LLM("/no/such/model", trace=path)
    assert path.read_text() == "an earlier run"

    monkeypatch.chdir(tmp_path)
    llm = make_llm(trace=path.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert "an earlier run" not in path.read_text()
    assert list((tmp_path / "elsewhere").iterdir()) == []


# -- times on a GPU --------------------------------------------------------------------------------


class FakeEvent:
    """A GPU that reaches each event one millisecond after the event before."""

    count = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        FakeEvent.count += 1
        self.at = FakeEvent.count

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return float(other.at - self.at)


def test_times_of_a_gpu_come_from_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = timing.DeviceClock(torch.device("cuda"))
    executor = timing.TimedExecutor(shared_llm().llm_engine.executor)
    executor.clock = clock
    monkeypatch.setattr(executor.executor, "launch", lambda batch: None)
    steps = [executor.launch(None) for _ in range(2)]  # type: ignore[arg-type]
    times = [time - clock.seconds for step in steps for time in step.device_times()]
    assert times == pytest.approx([0.001, 0.002, 0.003, 0.004])
