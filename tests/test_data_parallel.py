"""Several engines behind one LLM give what one engine and transformers give, and nothing hangs."""

from __future__ import annotations

import asyncio
import operator
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import dp_functions
import pytest
from tiny import greedy, random_prompts, shared_llm, shared_model

from nanovllm import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    EngineArgs,
    EngineDeadError,
    LLMEngine,
    RequestOutputKind,
    SamplingParams,
)
from nanovllm.data_parallel import DataParallelEngine, Failed, Placement

PROMPTS = random_prompts([5, 33, 90, 12, 1, 64, 17], seed=41)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(
    temperature=0, max_tokens=400, ignore_eos=True, output_kind=RequestOutputKind.DELTA
)
ARGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "num_gpu_blocks_override": 64,
    "max_num_batched_tokens": 256,
    "data_parallel_size": 2,
}


@cache
def shared_dp() -> LLM:
    return LLM(shared_model()[0], **ARGS)


@pytest.fixture
def llm() -> Iterator[LLM]:
    """The shared engines. After the test no engine has anything left of a request."""
    llm = shared_dp()
    yield llm
    engine = llm.llm_engine
    assert isinstance(engine, DataParallelEngine)
    assert not engine.has_unfinished_requests()
    assert not engine.placed
    assert not any(engine.unsent)
    assert engine.placement.work == [0, 0]
    assert metric(llm, "num_requests_running") == metric(llm, "num_requests_waiting") == 0
    assert metric(llm, "kv_cache_usage_perc") == 0


def metric(llm: LLM, name: str) -> float:
    return next(each.value for each in llm.get_metrics() if each.name == f"vllm:{name}")


def tokens(outputs: list[Any]) -> list[list[list[int]]]:
    return [[each.token_ids for each in output.outputs] for output in outputs]


# -- results -----------------------------------------------------------------------------------------


def test_outputs_are_transformers_in_order(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert tokens(outputs) == [[greedy(shared_model()[1], prompt, 12)] for prompt in PROMPTS]
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    ids = [int(output.request_id) for output in outputs]
    assert ids == list(range(ids[0], ids[0] + len(PROMPTS)))


def test_random_requests_without_seeds_are_one_engines() -> None:
    params = SamplingParams(max_tokens=8, n=2)
    many = LLM(shared_model()[0], skip_tokenizer_init=True, **ARGS)
    one = LLM(shared_model()[0], skip_tokenizer_init=True, **{**ARGS, "data_parallel_size": 1})
    found = [tokens(each.generate(PROMPTS, params, use_tqdm=False)) for each in (many, one)]
    assert found[0] == found[1]
    many.llm_engine.close()


def test_chat_text_and_logprobs_are_one_engines(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=1, stop="qq")
    messages = [[{"role": "user", "content": text}] for text in ("the other", "in", "here")]
    for found, one in zip(
        llm.chat(messages, params, use_tqdm=False),
        shared_llm().chat(messages, params, use_tqdm=False),
    ):
        assert found.prompt == one.prompt
        assert found.outputs == one.outputs
        assert found.prompt_logprobs == one.prompt_logprobs


def test_stream_shows_deltas(llm: LLM) -> None:
    params = GREEDY.clone()
    params.output_kind = RequestOutputKind.DELTA
    found: dict[str, list[int]] = {}
    for output in llm.stream(PROMPTS, params):
        found.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
    expected = [greedy(shared_model()[1], prompt, 12) for prompt in PROMPTS]
    assert [found[key] for key in sorted(found, key=int)] == expected


def test_the_progress_bar_counts_every_request(llm: LLM) -> None:
    counts: list[int] = []

    class Bar:
        def __init__(self, iterable: Any = None, **_: Any) -> None:
            self.iterable = iterable

        def __iter__(self) -> Iterator[Any]:
            return iter(self.iterable)

        def update(self, count: int) -> None:
            counts.append(count)

        def close(self) -> None: ...

    llm.generate(PROMPTS, GREEDY, use_tqdm=Bar)
    assert sum(counts) == len(PROMPTS)


def test_two_ids_of_the_engine_are_used_again(llm: LLM) -> None:
    """An id that was aborted may be used at once: old outputs do not reach the new request."""
    engine = llm.llm_engine
    engine.add_request("same", PROMPTS[0], ENDLESS)
    while not engine.step():
        pass
    engine.abort_request("same")
    engine.add_request("same", PROMPTS[1], GREEDY)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].outputs[0].token_ids == greedy(shared_model()[1], PROMPTS[1], 12)


# -- which engine ------------------------------------------------------------------------------------


def test_a_common_prefix_is_computed_once(llm: LLM) -> None:
    llm.reset_prefix_cache()
    (prefix, *rest) = random_prompts([64, 9, 9, 9, 9], seed=7)
    llm.generate([prefix + rest[0], PROMPTS[2], PROMPTS[5]], GREEDY, use_tqdm=False)
    for tail in rest[1:]:
        (output,) = llm.generate([prefix + tail], GREEDY, use_tqdm=False)
        assert output.num_cached_tokens == 64


def test_placement_follows_the_longest_known_prefix() -> None:
    placement = Placement(3, block_size=4, max_lead=100)
    assert placement.choose(range(8)) == 0
    placement.work[0] = 50
    assert placement.choose([9] * 8) == 1  # the least work
    placement.work[1] = 60
    assert placement.choose([*range(4), 5, 5, 5, 5]) == 0  # one block in common
    assert placement.choose([9] * 9) == 1
    assert placement.choose([7, 7, 7]) == 2  # no full block


def test_prompts_of_different_adapters_have_no_common_prefix() -> None:
    placement = Placement(2, block_size=4, max_lead=100)
    assert placement.choose(range(8), hash_seed=1) == 0
    placement.work[0] = 50
    assert placement.choose(range(8), hash_seed=2) == 1  # the least work
    placement.work[1] = 60
    assert placement.choose(range(8), hash_seed=1) == 0
    assert placement.choose(range(8), hash_seed=2) == 1


def test_placement_leaves_an_engine_that_is_far_ahead() -> None:
    placement = Placement(2, block_size=4, max_lead=100)
    assert placement.choose(range(8)) == 0
    placement.work[0] = 100
    assert placement.choose(range(8)) == 0
    placement.work[0] = 101
    assert placement.choose(range(8)) == 1
    assert placement.choose(range(8)) == 1  # now both have it, and 1 has less work


def test_equal_work_goes_to_all_engines_in_turn(llm: LLM) -> None:
    engine = llm.llm_engine
    assert isinstance(engine, DataParallelEngine)
    for i in range(4):
        engine.add_request(str(i), [i], GREEDY)
    assert [placed.engine for placed in engine.placed.values()] == [0, 1, 0, 1]
    engine.abort_request([str(i) for i in range(4)])


# -- ends and errors ---------------------------------------------------------------------------------


def test_a_refused_request_changes_nothing(llm: LLM) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        llm.generate([PROMPTS[0], [10**6]], GREEDY, use_tqdm=False)


def test_closing_a_stream_ends_its_requests(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[:3], ENDLESS)
    next(stream)
    stream.close()


def test_ctrl_c_ends_all_requests_and_the_engines_go_on(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[:3], ENDLESS)
    receive = llm.llm_engine._receive

    def interrupted() -> None:
        llm.llm_engine._receive = receive
        signal.raise_signal(signal.SIGINT)
        receive()

    llm.llm_engine._receive = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert tokens(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)) == [
        [greedy(shared_model()[1], prompt, 12)] for prompt in PROMPTS[:2]
    ]


def test_a_failed_step_raises_and_the_engines_go_on(llm: LLM) -> None:
    llm.collective_rpc(dp_functions.break_next_step)
    with pytest.raises(ArithmeticError, match="broken"):
        llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
    with pytest.raises(ArithmeticError, match="broken"):  # the second engine's
        llm.generate([[1], [2]], GREEDY, use_tqdm=False)
    assert tokens(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)) == [
        [greedy(shared_model()[1], prompt, 12)] for prompt in PROMPTS[:2]
    ]


def test_an_error_of_dropped_requests_does_not_end_later_ones(llm: LLM) -> None:
    engine = llm.llm_engine
    late = Failed(ArithmeticError("of two engines that failed together"), engine.era)
    engine.reset()
    engine.workers.inbox.put((2, pickle.dumps(late)))
    assert tokens(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)) == [
        [greedy(shared_model()[1], prompt, 12)] for prompt in PROMPTS[:2]
    ]


def test_a_function_that_cannot_be_sent_refuses_its_own_request(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[:2], GREEDY)
    mine = SamplingParams(logits_processors=[lambda output_ids, logits: logits])
    with pytest.raises(TypeError, match="top level of a file"):
        llm.generate(PROMPTS[2], mine, use_tqdm=False)
    last = {output.request_id: output for output in stream}
    assert tokens([last[key] for key in sorted(last, key=int)]) == [
        [greedy(shared_model()[1], prompt, 12)] for prompt in PROMPTS[:2]
    ]


def test_a_function_that_an_engine_cannot_read_ends_its_own_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("only_here")
    exec("def same(output_ids, logits): return logits", vars(module))
    monkeypatch.setitem(sys.modules, "only_here", module)
    params = [GREEDY, SamplingParams(logits_processors=[module.same]), GREEDY]
    first, failed, third = llm.generate(PROMPTS[:3], params, use_tqdm=False)
    assert tokens([first, third]) == [
        [greedy(shared_model()[1], prompt, 12)] for prompt in (PROMPTS[0], PROMPTS[2])
    ]
    assert failed.outputs[0].finish_reason == "error"
    assert "only_here" in failed.outputs[0].stop_reason
    with pytest.raises(ModuleNotFoundError, match="only_here"):
        llm.collective_rpc(module.same)


def test_ctrl_c_in_a_call_loses_no_output(llm: LLM) -> None:
    """The interrupt comes at the worst time: an output was taken from the inbox."""
    params = GREEDY.clone()
    params.output_kind = RequestOutputKind.DELTA
    stream = llm.stream(PROMPTS[:1], params)
    workers = llm.llm_engine.workers
    inbox = workers.inbox

    class Interrupting:
        put = inbox.put

        def get(self, timeout: float) -> Any:
            reply = inbox.get(timeout=timeout)
            if isinstance(pickle.loads(reply[1]), list):
                workers.inbox = inbox
                signal.raise_signal(signal.SIGINT)
            return reply

    llm.llm_engine._send_unsent()
    workers.inbox = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        deque(iter(llm.get_metrics, None))  # calls for ever
    found = [token for output in stream for token in output.outputs[0].token_ids]
    assert found == greedy(shared_model()[1], PROMPTS[0], 12)


def test_every_engine_has_its_own_objects_of_the_users_classes() -> None:
    llm = LLM(
        shared_model()[0],
        skip_tokenizer_init=True,
        logits_processors=["dp_functions:OneStepOneToken"],
        **ARGS,
    )
    engine = llm.llm_engine
    lengths = {"0": 3, "1": 4, "2": 9, "3": 10}  # the first two end while the others run
    found = {}
    for key, length in lengths.items():
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        engine.add_request(key, [1], params)
        engine.run_step()
    while engine.has_unfinished_requests():
        found.update({out.request_id: out.outputs[0].token_ids for out in engine.step()})
    assert found == {key: list(range(length)) for key, length in lengths.items()}
    engine.close()


def test_a_dead_engine_is_named_and_nothing_hangs() -> None:
    llm = LLM(shared_model()[0], skip_tokenizer_init=True, **ARGS)
    pids = llm.collective_rpc(dp_functions.pid)
    assert len(set(pids)) == 2
    os.kill(pids[1], signal.SIGSTOP)  # so that it cannot finish before it is killed
    stream = llm.stream(PROMPTS[:2], ENDLESS)
    next(stream)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=rf"engine 2 \(process {pids[1]}\) was killed"):
        list(stream)
    for call in (llm.get_metrics, lambda: llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)):
        with pytest.raises(EngineDeadError, match="a new one is needed: engine 2"):
            call()


def test_an_engine_that_cannot_start_raises_its_own_error() -> None:
    with pytest.raises(ValueError, match="raise num_gpu_blocks_override"):
        LLM(
            shared_model()[0],
            skip_tokenizer_init=True,
            **{**ARGS, "num_gpu_blocks_override": 1},
        )


def test_what_cannot_work_is_refused_before_any_process_starts() -> None:
    with pytest.raises(ValueError, match="use LLM or AsyncLLM"):
        LLMEngine(EngineArgs(shared_model()[0], **ARGS))
    with pytest.raises(ValueError, match="external_launcher"):
        LLM(shared_model()[0], distributed_executor_backend="external_launcher", **ARGS)
    with pytest.raises(TypeError, match="top level of a file"):
        LLM(shared_model()[0], hf_overrides=lambda config: config, **ARGS)
    with pytest.raises(ValueError, match="data_parallel_size=0"):
        LLM(shared_model()[0], data_parallel_size=0)


# -- all engines -------------------------------------------------------------------------------------


def test_calls_reach_every_engine(llm: LLM) -> None:
    assert llm.get_world_size() == 2
    assert llm.get_world_size(include_dp=False) == 1
    assert llm.collective_rpc(operator.attrgetter("rank")) == [0, 0]
    assert [each.__name__ for each in llm.apply_model(type)] == ["Qwen3ForCausalLM"] * 2
    with pytest.raises(ValueError, match="no method 'missing'"):
        llm.collective_rpc("missing")
    with pytest.raises(TypeError, match="top level of a file"):
        llm.apply_model(lambda model: None)
    with pytest.raises(AttributeError, match="apply_model"):
        _ = llm.llm_engine.model_executor


def test_sleep_and_wake_up(llm: LLM) -> None:
    llm.sleep(level=1)
    with pytest.raises(ValueError, match="sleeps"):
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    llm.wake_up(tags=["weights"])
    with pytest.raises(ValueError, match="kv_cache are freed"):
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    llm.wake_up()
    test_outputs_are_transformers_in_order(llm)


def test_async_llm_over_several_engines() -> None:
    async def test(llm: AsyncLLM) -> None:
        async def last(prompt: list[int], request_id: str) -> Any:
            return [output async for output in llm.generate(prompt, GREEDY, request_id)][-1]

        endless = llm.generate(PROMPTS[0], ENDLESS, "endless")
        first = await anext(endless)
        found = await asyncio.gather(*[last(prompt, str(i)) for i, prompt in enumerate(PROMPTS)])
        assert tokens(found) == [[greedy(shared_model()[1], prompt, 12)] for prompt in PROMPTS]
        await llm.abort("endless")
        rest = [output async for output in endless]
        # The engine may have run to the end, because its process waits for no reader.
        assert [output.finished for output in rest] == [False] * (len(rest) - 1) + [True]
        assert rest[-1].outputs[0].finish_reason in ("abort", "length")
        streamed = [t for output in [first, *rest] for t in output.outputs[0].token_ids]
        assert streamed == greedy(shared_model()[1], PROMPTS[0], len(streamed))
        assert await llm.collective_rpc(operator.attrgetter("rank")) == [0, 0]
        assert await llm.reset_prefix_cache()
        await llm.sleep(level=1)
        await llm.wake_up()
        assert tokens([await last(PROMPTS[1], "awake")]) == tokens(found[1:2])

    args = AsyncEngineArgs(shared_model()[0], skip_tokenizer_init=True, **ARGS)
    llm = AsyncLLM.from_engine_args(args)
    asyncio.run(test(llm))
    llm.shutdown()
