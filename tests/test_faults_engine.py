"""Faults of one request stay with it: bad logits, bans that leave nothing, errors inside a step,
threads, forks.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import LLM, SamplingParams, kernels
from nanovllm.engine import output_processor
from nanovllm.sampling_params import RequestOutputKind
from tests.tiny import EOS, assert_idle, make_llm, nothing_is_left, shared_llm  # noqa: F401

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONGER = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def tokens_of(output: Any) -> list[int]:
    return output.outputs[0].token_ids


# -- what leaves no token to sample is refused when the request is added ---------------------------


@pytest.mark.parametrize(
    "params",
    [
        # B"b" is 65 in the tiny tokenizer's vocabulary.
        {"allowed_token_ids": [65], "bad_words": ["b"]},
        {"allowed_token_ids": [EOS], "min_tokens": 3},
        {"allowed_token_ids": [65, 66], "logit_bias": {65: float("-inf"), 66: float("-inf")}},
        {"allowed_token_ids": [65, EOS], "logit_bias": {65: float("-inf")}, "min_tokens": 1},
        {"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 1},
        {"logit_bias": dict.fromkeys(range(300), float("-inf"))},
    ],
)
def test_bans_that_leave_nothing_are_refused_with_their_names(params):
    llm = shared_llm()
    word = llm.get_tokenizer().decode([65])
    params = {**params, **({"bad_words": [word]} if "bad_words" in params else {})}
    with pytest.raises(ValueError, match="leave no token that may be sampled") as error:
        llm.generate([[70, 71]], SamplingParams(max_tokens=4, **params), use_tqdm=False)
    assert all(name in str(error.value) for name in params if name != "stop_token_ids")


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_request_that_bans_all_it_allows_on_the_way_ends_alone(temperature):
    llm = shared_llm()
    word = llm.get_tokenizer().decode([65, 65])
    dead_end = SamplingParams(
        temperature=temperature,
        max_tokens=6,
        allowed_token_ids=[65],
        bad_words=[word],
        ignore_eos=True,
        seed=1,
    )
    alone = tokens_of(llm.generate([[70]], GREEDY, use_tqdm=False)[0])
    neighbour, failed = llm.generate([[70], [71]], [GREEDY, dead_end], use_tqdm=False)
    assert tokens_of(neighbour) == alone
    assert failed.outputs[0].finish_reason == "error"
    assert "allowed_token_ids=[65]" in failed.outputs[0].stop_reason


@pytest.mark.parametrize("bias", [1e39, -1e39, float("inf"), float("nan"), 2**1024])
def test_a_bias_that_float32_cannot_hold_is_refused(bias):
    with pytest.raises((ValueError, OverflowError), match="logit_bias"):
        SamplingParams(logit_bias={66: bias})


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
@pytest.mark.parametrize("value", [1e39, 1e300])
def test_numbers_that_float32_cannot_hold_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a float32 number"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "params", [{"logit_bias": {66: 3e38}}, {"logit_bias": {66: 3e38}, "repetition_penalty": 0.01}]
)
def test_the_largest_bias_wins(params):
    params = SamplingParams(temperature=0.5, seed=1, max_tokens=3, ignore_eos=True, **params)
    assert tokens_of(shared_llm().generate([[65]], params, use_tqdm=False)[0]) == [66, 66, 66]


# -- ids that the tokenizer knows and the model has no row for -------------------------------------


def test_ids_without_a_row_are_ignored_or_refused_and_never_reach_a_step():
    llm = make_llm()
    tokenizer = llm.get_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    extra = tokenizer.convert_tokens_to_ids("<extra>")
    assert extra == llm.llm_engine.vocab_size
    expected = tokens_of(llm.generate([[70]], GREEDY, use_tqdm=False)[0])
    ignored = [
        {"bad_words": ["<extra>"]},
        {"bad_words": ["<extra>x", "x<extra>"]},
        {"stop": ["<extra>"]},
        {"stop_token_ids": [extra], "min_tokens": 2},
        {"logit_bias": {extra: 5.0}},
        {"allowed_token_ids": [*range(300), extra]},
    ]
    for given_params in ignored:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, **given_params)
        assert tokens_of(llm.generate([[70]], params, use_tqdm=False)[0]) == expected, given_params
    for refused in [
        {"allowed_token_ids": [extra]},
        {"logit_bias": {extra + 1: 1.0}},
        {"stop_token_ids": [-1]},
    ]:
        with pytest.raises(ValueError, match=next(iter(refused))):
            llm.generate([[70]], SamplingParams(**refused), use_tqdm=False)
    with pytest.raises(ValueError, match=f"token id {extra} is outside the vocabulary"):
        llm.generate("a<extra>", GREEDY, use_tqdm=False)


# -- white space in bad words ----------------------------------------------------------------------


@pytest.mark.parametrize("word", ["\n", "\t", "\n\n", " "])
def test_a_white_space_word_bans_itself_and_nothing_else(word):
    llm = shared_llm()
    tokenizer = llm.get_tokenizer()
    ids = [tokenizer.encode(text, add_special_tokens=False)[0] for text in ("\n", " ", "a", "\t")]
    params = SamplingParams(
        max_tokens=200, seed=1, allowed_token_ids=ids, bad_words=[word], ignore_eos=True
    )
    text = tokenizer.decode(tokens_of(llm.generate([[65]], params, use_tqdm=False)[0]))
    assert word not in text
    assert {"\n", " ", "a", "\t"} - {word} == set(text)


# -- logits of any kind give an id of the vocabulary -----------------------------------------------

NAN, INF, MANY = float("nan"), float("inf"), 3000
ROWS = {
    "all -inf": torch.full((MANY,), -INF),
    "all nan": torch.full((MANY,), NAN),
    "all inf": torch.full((MANY,), INF),
    "one inf": torch.zeros(MANY).index_fill(0, torch.tensor([1234]), INF),
    "two inf": torch.zeros(MANY).index_fill(0, torch.tensor([7, 2999]), INF),
    "nan and numbers": torch.full((MANY,), NAN).index_fill(0, torch.tensor([40, 2048]), 1.0),
    "-inf and one": torch.full((MANY,), -INF).index_fill(0, torch.tensor([2999]), -3e38),
}
CANDIDATES = {
    "all -inf": {0},
    "all nan": {0},
    "all inf": set(range(MANY)),
    "one inf": {1234},
    "two inf": {7, 2999},
    "nan and numbers": {40, 2048},
    "-inf and one": {2999},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plain", [False, True], ids=["kernel", "definition"])
def test_rows_of_any_logits_give_a_candidate(dtype, plain, monkeypatch):
    if plain:
        monkeypatch.setattr(kernels.cpu, "draw", lambda *_: None)
    logits = torch.stack(list(ROWS.values())).to(dtype)
    count = len(logits)
    for temperature, u in [(0.0, 0.5), (1.0, 0.0), (1.0, 0.999), (0.01, 0.4), (100.0, 0.7)]:
        ids = kernels.draw(logits, torch.full((count,), temperature), torch.full((count,), u))
        for name, token in zip(ROWS, ids.tolist()):
            assert token in CANDIDATES[name], (name, temperature, u)
    for name, token in zip(ROWS, kernels.argmax(logits).tolist()):
        assert token == min(CANDIDATES[name]), name


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_that_computes_nan_for_one_prompt_leaves_its_neighbours_alone(temperature):
    llm = make_llm()
    params = SamplingParams(
        temperature=temperature, seed=3, max_tokens=6, ignore_eos=True, logprobs=2
    )
    alone = tokens_of(llm.generate([[70, 71]], params, use_tqdm=False)[0])
    weight = llm.apply_model(lambda model: model.model.embed_tokens.weight)[0]
    saved = weight.data.clone()
    with llm.apply_model(lambda model: model.unpacked())[0]:
        weight.data[200] = NAN
    try:
        poisoned, neighbour = llm.generate([[200, 200], [70, 71]], params, use_tqdm=False)
    finally:
        weight.data.copy_(saved)
        llm.reset_prefix_cache()
    assert tokens_of(neighbour) == alone
    assert all(0 <= token < 300 for token in tokens_of(poisoned))


# -- an error that belongs to a request ends that request ------------------------------------------


def outputs_with_fault(llm: LLM, params: list[SamplingParams]) -> list[Any]:
    return llm.generate([[70, 71, 72], [80, 81], [90, 91]], params, use_tqdm=False)


def expect_second_alone_failed(
    llm: LLM, params: list[SamplingParams], monkeypatch: Any, patch: Any
) -> None:
    expected = [tokens_of(output) for output in outputs_with_fault(llm, params)]
    llm.reset_prefix_cache()
    with monkeypatch.context() as context:
        patch(context)
        first, second, third = outputs_with_fault(llm, params)
    assert [tokens_of(first), tokens_of(third)] == [expected[0], expected[2]]
    assert second.finished
    assert second.outputs[0].finish_reason == "error"
    assert "injected" in second.outputs[0].stop_reason
    assert [tokens_of(output) for output in outputs_with_fault(llm, params)] == expected


def failing(function: Any, when: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise RuntimeError("injected")
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("overlap", [False, True])
def test_a_fault_in_admission_ends_one_request(overlap, monkeypatch):
    llm = shared_llm(async_scheduling=overlap)
    blocks = llm.llm_engine.scheduler.blocks

    def patch(context: Any) -> None:
        context.setattr(blocks, "match", failing(blocks.match, lambda ids, *_: ids[0] == 80))

    expect_second_alone_failed(llm, [GREEDY] * 3, monkeypatch, patch)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["logit_bias", "penalties"])
def test_a_fault_in_packing_a_logits_processor_ends_one_request(name, overlap, monkeypatch):
    llm = shared_llm(async_scheduling=overlap)
    biased = SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, logit_bias={3: 1.0}, presence_penalty=0.5
    )

    (ability,) = (ability for ability in llm.llm_engine.abilities if ability.name == name)

    def second(table: Any, rows: Any, lengths: Any, users: Any) -> bool:
        return any(table.token_ids[rows[i], 0] == 80 for i in users)

    def patch(context: Any) -> None:
        context.setattr(ability, "part", failing(ability.part, second))

    expect_second_alone_failed(llm, [biased] * 3, monkeypatch, patch)


@pytest.mark.parametrize("overlap", [False, True])
def test_prompt_logprobs_are_right_after_a_request_that_failed_alone(overlap, monkeypatch):
    """The step of a failed request may never be collected, and its prompt logprobs with it."""
    llm = shared_llm(async_scheduling=overlap)
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, logit_bias={3: 1.0})
    (expected,) = llm.generate([[70, 71, 72]], params, use_tqdm=False)
    (ability,) = (ability for ability in llm.llm_engine.abilities if ability.name == "logit_bias")
    with monkeypatch.context() as context:
        context.setattr(ability, "part", failing(ability.part, lambda *_: True))
        (failed,) = llm.generate([[80, 81]], params, use_tqdm=False)
    assert failed.outputs[0].finish_reason == "error"
    (output,) = llm.generate([[70, 71, 72]], params, use_tqdm=False)
    assert output.prompt_logprobs == expected.prompt_logprobs


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize("overlap", [False, True])
def test_a_fault_in_detokenising_ends_one_request(overlap, kind, monkeypatch):
    llm = shared_llm(async_scheduling=overlap)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, output_kind=kind)
    expected = [tokens_of(output) for output in outputs_with_fault(llm, [GREEDY] * 3)]
    others = {70, 71, 72, 80, 81, 90, 91, *expected[0], *expected[2]}
    victim = next(token for token in expected[1] if token not in others)
    detokenizer = llm.llm_engine.output_processor.detokenizer
    with monkeypatch.context() as context:
        decode = failing(detokenizer._decode, lambda ids, **_: victim in ids)
        context.setattr(detokenizer, "_decode", decode)
        last: dict[str, Any] = {}
        found: dict[str, list[int]] = {}
        for output in llm.stream([[70, 71, 72], [80, 81], [90, 91]], params):
            delta = kind is RequestOutputKind.DELTA and output.request_id in found
            found[output.request_id] = (found[output.request_id] if delta else []) + tokens_of(
                output
            )
            last[output.request_id] = output
    first, second, third = (last[request_id] for request_id in sorted(last, key=int))
    assert [found[first.request_id], found[third.request_id]] == [expected[0], expected[2]]
    assert second.outputs[0].finish_reason == "error"
    assert "injected" in second.outputs[0].stop_reason


def test_a_fault_in_logprobs_ends_one_request(monkeypatch):
    llm = shared_llm()
    params = [
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=k, prompt_logprobs=1)
        for k in (1, 3, 2)
    ]

    def patch(context: Any) -> None:
        third = failing(output_processor.logprob_entry, lambda token, row, found, k, *_: k == 3)
        context.setattr(output_processor, "logprob_entry", third)

    expect_second_alone_failed(llm, params, monkeypatch, patch)


@pytest.mark.parametrize("stage", ["schedule", "forward", "sample", "update"])
def test_a_fault_of_the_device_or_the_scheduler_ends_the_step_and_the_engine_goes_on(
    stage, monkeypatch
):
    llm = shared_llm()
    engine = llm.llm_engine
    expected = [tokens_of(output) for output in outputs_with_fault(llm, [GREEDY] * 3)]
    owner, name = {
        "schedule": (engine.scheduler, "_grant_running"),
        "forward": (engine.executor.runner, "forward"),
        "sample": (engine.executor.runner.next_tokens, "sample"),
        "update": (engine.scheduler, "update"),
    }[stage]
    with monkeypatch.context() as context:
        context.setattr(owner, name, failing(getattr(owner, name), lambda *_: True))
        with pytest.raises(RuntimeError, match="injected"):
            outputs_with_fault(llm, [GREEDY] * 3)
    assert_idle(llm)
    assert [tokens_of(output) for output in outputs_with_fault(llm, [GREEDY] * 3)] == expected


def test_n_completions_of_a_failed_request_all_end(monkeypatch):
    llm = shared_llm()
    params = SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True, logprobs=1)
    calls = []
    fifth = failing(output_processor.logprob_entry, lambda *_: calls.append(1) or len(calls) == 5)
    monkeypatch.setattr(output_processor, "logprob_entry", fifth)
    (output,) = llm.generate([[70]], params, use_tqdm=False)
    assert [completion.finish_reason for completion in output.outputs] == ["error"] * 3


# -- threads ---------------------------------------------------------------------------------------


def test_threads_get_right_answers_from_one_engine():
    llm = shared_llm(async_scheduling=True)
    prompts = [[65 + i, 40 + i] for i in range(24)]
    params = [SamplingParams(max_tokens=12, seed=i, ignore_eos=True) for i in range(24)]
    expected = [tokens_of(output) for output in llm.generate(prompts, params, use_tqdm=False)]

    def streamed(i: int) -> list[int]:
        delta = params[i].clone()
        delta.output_kind = RequestOutputKind.DELTA
        return list(
            chain.from_iterable(tokens_of(output) for output in llm.stream([prompts[i]], delta))
        )

    def generated(i: int) -> list[int]:
        return tokens_of(llm.generate([prompts[i]], params[i], use_tqdm=False)[0])

    def chatted(i: int) -> list[int]:
        return tokens_of(
            llm.chat([{"role": "user", "content": "hi"}], params[i], use_tqdm=False)[0]
        )

    chat = [chatted(i) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit([streamed, generated, chatted][i % 3], i) for i in range(24)]
        found = [job.result(timeout=300) for job in jobs]
    assert found == [chat[i] if i % 3 == 2 else expected[i] for i in range(24)]


def test_a_failed_step_reaches_every_thread(monkeypatch):
    llm = shared_llm()
    runner = llm.llm_engine.executor.runner
    started = threading.Barrier(2)

    def run(i: int) -> BaseException | None:
        stream = llm.stream([[70 + i]], SamplingParams(max_tokens=400, ignore_eos=True))
        next(stream)
        started.wait()
        try:
            for _ in stream:
                pass
        except RuntimeError as err:
            return err
        return None

    threads = ThreadPoolExecutor(2)
    with threads, monkeypatch.context() as context:
        calls: list[int] = []
        context.setattr(
            runner,
            "forward",
            failing(runner.forward, lambda *_: calls.append(1) or len(calls) > 40),
        )
        errors = list(threads.map(run, range(2)))
    assert all(isinstance(error, RuntimeError) for error in errors)
    assert_idle(llm)


def test_requests_of_the_engine_itself_reach_its_own_caller_while_generate_steps():
    llm = shared_llm()
    engine = llm.llm_engine
    engine.add_request("mine", [70, 71], GREEDY)
    expected = tokens_of(llm.generate([[80, 81]], GREEDY, use_tqdm=False)[0])
    outputs = engine.step()
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"mine"}
    assert tokens_of(outputs[-1]) == tokens_of(llm.generate([[70, 71]], GREEDY, use_tqdm=False)[0])
    assert expected == tokens_of(llm.generate([[80, 81]], GREEDY, use_tqdm=False)[0])


def test_a_caller_that_asks_for_unfinished_requests_gets_outputs_that_others_have_made():
    llm = shared_llm()
    engine = llm.llm_engine
    engine.add_request("mine", [70, 71], GREEDY)
    llm.generate([[80, 81]], LONGER, use_tqdm=False)
    assert engine.get_num_unfinished_requests() == 0
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].request_id == "mine"
    assert outputs[-1].finished
    assert_idle(llm)


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_of_the_engine_itself_reach_its_own_caller_while_threads_generate(overlap):
    llm = shared_llm(async_scheduling=overlap)
    engine = llm.llm_engine
    prompts = [[70 + i, 71] for i in range(12)]
    expected = [tokens_of(out) for out in llm.generate(prompts, GREEDY, use_tqdm=False)]

    def generated(i: int) -> list[int]:
        return tokens_of(llm.generate([prompts[i]], GREEDY, use_tqdm=False)[0])

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(generated, i) for i in range(12)]
        last = {}
        for i in range(12):
            engine.add_request(f"mine {i}", prompts[i], GREEDY)
            while f"mine {i}" not in last:
                last |= {out.request_id: out for out in engine.step() if out.finished}
        found = [job.result(timeout=300) for job in jobs]
    assert found == expected
    assert [tokens_of(last[f"mine {i}"]) for i in range(12)] == expected


# -- a forked child --------------------------------------------------------------------------------


def call_in_child(make_new: bool, results: Any) -> None:
    try:
        if make_new:
            make_llm()
        else:
            shared_llm().generate([[70]], GREEDY, use_tqdm=False)
    except Exception as err:
        results.put(f"{type(err).__name__}: {err}")
    else:
        results.put("no error")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make_new", [False, True])
def test_a_forked_child_gets_one_sentence(make_new):
    llm = shared_llm()
    expected = tokens_of(llm.generate([[70]], GREEDY, use_tqdm=False)[0])
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=call_in_child, args=(make_new, results))
    child.start()
    message = results.get()
    child.join()
    assert message.startswith("RuntimeError: process")
    assert "was forked from" in message
    assert tokens_of(llm.generate([[70]], GREEDY, use_tqdm=False)[0]) == expected


# -- names that vLLM's scripts call ----------------------------------------------------------------


def test_weights_are_reloaded_by_name_and_the_worker_is_found_as_in_vllm():
    llm = make_llm(enable_sleep_mode=True)
    expected = tokens_of(llm.generate([[70]], GREEDY, use_tqdm=False)[0])
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    assert model is llm.apply_model(lambda found: found)[0]
    assert llm.collective_rpc("get_model") == [model]
    for parameter in model.parameters():
        parameter.data.zero_()
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    assert tokens_of(llm.generate([[70]], GREEDY, use_tqdm=False)[0]) == expected
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    assert tokens_of(llm.generate([[70]], GREEDY, use_tqdm=False)[0]) == expected


# -- everything at once ----------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
IDS = st.lists(st.integers(-1, 305), max_size=12)
PROMPTS = st.one_of(
    TEXT,
    IDS,
    IDS.map(np.array),
    TEXT.map(lambda text: {"prompt": text}),
    st.tuples(TEXT, IDS).map(lambda pair: {"prompt": pair[0], "prompt_token_ids": pair[1]}),
    st.sampled_from([None, b"bytes", 3.5, {"other": 1}, "\ud800", [1.5], [[1]], {"prompt": None}]),
)
TOKEN = st.integers(-1, 302)
NUMBER = st.floats(width=32) | st.sampled_from([0.0, 1.0, 1e39, -1e39, NAN, INF])
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(0, 3),
        "temperature": NUMBER,
        "top_p": NUMBER,
        "top_k": st.integers(-2, 400),
        "min_p": NUMBER,
        "presence_penalty": NUMBER,
        "frequency_penalty": NUMBER,
        "repetition_penalty": NUMBER,
        "seed": st.integers(-2, 2**65),
        "stop": st.lists(TEXT, max_size=2),
        "stop_token_ids": st.lists(TOKEN, max_size=3),
        "max_tokens": st.none() | st.integers(0, 9),
        "min_tokens": st.integers(0, 5),
        "logprobs": st.integers(-1, 3),
        "prompt_logprobs": st.integers(0, 2),
        "logit_bias": st.dictionaries(TOKEN, NUMBER, max_size=3),
        "allowed_token_ids": st.lists(TOKEN, max_size=3),
        "bad_words": st.lists(TEXT, max_size=3),
        "ignore_eos": st.booleans(),
        "detokenize": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
    },
)


@pytest.mark.parametrize("overlap", [False, True])
def test_any_requests_end_in_a_result_or_a_sentence(overlap):
    """2,000 requests, ten at a time beside a greedy neighbour that must not notice."""
    llm = make_llm(max_model_len=64, num_gpu_blocks_override=24, async_scheduling=overlap)
    expected = tokens_of(llm.generate([[70, 71]], GREEDY, use_tqdm=False)[0])
    ends: Counter[str] = Counter()

    @settings(
        max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(st.tuples(PROMPTS, PARAMS), min_size=10, max_size=10))
    def run(requests: list[tuple[Any, dict[str, Any]]]) -> None:
        engine = llm.llm_engine
        engine.add_request("neighbour", [70, 71], GREEDY)
        accepted = set()
        for number, (prompt, given_params) in enumerate(requests):
            try:
                params = SamplingParams(
                    **given_params, output_kind=list(RequestOutputKind)[number % 3]
                )
                if params.max_tokens is None:
                    params.max_tokens = 20
                engine.add_request(str(number), prompt, params)
                accepted.add(str(number))
            except (TypeError, ValueError, OverflowError):
                ends["refused"] += 1
        finished = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = output
        assert finished.keys() == accepted | {"neighbour"}
        assert tokens_of(finished.pop("neighbour")) == expected
        for output in finished.values():
            for completion in output.outputs:
                assert completion.finish_reason in ("stop", "length", "error")
                assert completion.finish_reason != "error" or completion.stop_reason
                assert all(0 <= token < 300 for token in completion.token_ids)
                ends[completion.finish_reason] += 1
        assert_idle(llm)

    run()
    assert ends["refused"] > 50
    assert ends["length"] + ends["stop"] > 50
