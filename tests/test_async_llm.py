"""AsyncLLM: coroutines get what transformers gives, and nothing is left of a request however it ends.

The tests wait for events, never for a time.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import greedy, random_prompts, shared_llm, shared_model

from nanovllm import (
    AsyncEngineArgs,
    AsyncLLM,
    AsyncLLMEngine,
    EngineDeadError,
    RequestOutputKind,
    SamplingParams,
)
from nanovllm.async_llm import AsyncOutputs, deliver

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
PROMPTS = random_prompts([5, 33, 90, 12], seed=41)
ENDLESS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


def params(kind: RequestOutputKind = CUMULATIVE, **kwargs: Any) -> SamplingParams:
    defaults = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    return SamplingParams(output_kind=kind, **{**defaults, **kwargs})


def make_async(**kwargs: Any) -> AsyncLLM:
    args = {"dtype": "float32", "num_gpu_blocks_override": 64, "max_num_batched_tokens": 64}
    return AsyncLLM.from_engine_args(AsyncEngineArgs(shared_model()[0], **{**args, **kwargs}))


def run(test: Callable[[AsyncLLM], Awaitable[None]], **kwargs: Any) -> None:
    """Runs a test with an engine. Afterwards the engine must be idle."""
    llm = make_async(**kwargs)
    try:
        asyncio.run(test(llm))
        assert llm._thread.send(is_idle).result()
    finally:
        llm.shutdown()


def is_idle(engine: Any) -> bool:
    scheduler = engine.scheduler
    return not engine.has_unfinished_requests() and not any(scheduler.blocks.ref_counts)


async def outputs(llm: AsyncLLM, prompt: Any, how: SamplingParams, request_id: str) -> list[Any]:
    return [output async for output in llm.generate(prompt, how, request_id)]


@pytest.mark.parametrize("overlap", [False, True])
def test_coroutines_at_once_get_what_transformers_gives(overlap: bool) -> None:
    async def test(llm: AsyncLLM) -> None:
        asked = [outputs(llm, prompt, params(), str(i)) for i, prompt in enumerate(PROMPTS)]
        for i, found in enumerate(await asyncio.gather(*asked)):
            assert [output.finished for output in found] == [False] * (len(found) - 1) + [True]
            assert {output.request_id for output in found} == {str(i)}
            assert found[-1].outputs[0].token_ids == greedy(shared_model()[1], PROMPTS[i], 12)

    run(test, async_scheduling=overlap)


def test_output_kinds_show_the_same_text_as_generate() -> None:
    prompt = "the other"
    (whole,) = shared_llm().generate(prompt, params(), use_tqdm=False)
    text, token_ids = whole.outputs[0].text, whole.outputs[0].token_ids

    async def test(llm: AsyncLLM) -> None:
        (final,) = await outputs(llm, prompt, params(FINAL_ONLY), "final")
        assert (final.outputs[0].text, final.outputs[0].token_ids) == (text, token_ids)
        deltas = await outputs(llm, prompt, params(DELTA), "delta")
        assert "".join(output.outputs[0].text for output in deltas) == text
        assert [t for output in deltas for t in output.outputs[0].token_ids] == token_ids
        cumulative = await outputs(llm, {"prompt": prompt}, params(CUMULATIVE), "cumulative")
        for earlier, later in pairwise(cumulative):
            assert later.outputs[0].text.startswith(earlier.outputs[0].text)
        assert cumulative[-1].outputs[0].text == text

    run(test)


def test_a_refused_request_raises_in_its_own_iterator_only() -> None:
    async def test(llm: AsyncLLM) -> None:
        found = await asyncio.gather(
            outputs(llm, PROMPTS[0], params(), "good"),
            outputs(llm, [10**6], params(), "bad token"),
            outputs(llm, PROMPTS[1], params(logprobs=99), "bad parameter"),
            outputs(llm, 3.5, params(), "bad type"),
            return_exceptions=True,
        )
        assert found[0][-1].outputs[0].token_ids == greedy(shared_model()[1], PROMPTS[0], 12)
        assert isinstance(found[1], ValueError)
        assert isinstance(found[2], ValueError)
        assert isinstance(found[3], TypeError)

    run(test)


def test_an_id_in_use_is_refused_and_the_first_request_goes_on() -> None:
    async def test(llm: AsyncLLM) -> None:
        first = llm.generate(PROMPTS[0], params(), "same")
        await anext(first)
        with pytest.raises(ValueError, match="in use"):
            await outputs(llm, PROMPTS[1], params(), "same")
        rest = [output async for output in first]
        assert rest[-1].outputs[0].token_ids == greedy(shared_model()[1], PROMPTS[0], 12)

    run(test, async_scheduling=False)


@pytest.mark.parametrize("how", ["close", "cancel", "collect"])
def test_leaving_an_iterator_ends_its_request(how: str) -> None:
    """`run` checks that no page is left."""

    async def test(llm: AsyncLLM) -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in llm.generate(PROMPTS[0], ENDLESS, "left"):
                started.set()

        if how == "cancel":
            task = asyncio.create_task(read())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            iterator = llm.generate(PROMPTS[0], ENDLESS, "left")
            await anext(iterator)
            if how == "close":
                await iterator.aclose()
            del iterator
            gc.collect()
        found = await outputs(llm, PROMPTS[1], params(), "next")
        assert found[-1].outputs[0].token_ids == greedy(shared_model()[1], PROMPTS[1], 12)

    run(test)


def test_abort_gives_the_iterator_a_last_output() -> None:
    async def test(llm: AsyncLLM) -> None:
        iterator = llm.generate(PROMPTS[0], ENDLESS, "ended")
        await anext(iterator)
        await llm.abort(["ended", "unknown"])
        last = [output async for output in iterator][-1]
        completion = last.outputs[0]
        assert (last.finished, completion.finish_reason) == (True, "abort")
        expected = greedy(shared_model()[1], PROMPTS[0], len(completion.token_ids))
        assert completion.token_ids == expected

    run(test)


def test_a_failed_step_raises_in_every_iterator_and_the_engine_goes_on() -> None:
    async def test(llm: AsyncLLM) -> None:
        launch = llm.engine.executor.launch

        def fail(batch: Any) -> Any:
            llm.engine.executor.launch = launch
            raise ArithmeticError("broken")

        iterators = [llm.generate(PROMPTS[i], ENDLESS, str(i)) for i in (0, 1)]
        for iterator in iterators:
            await anext(iterator)
        llm.engine.executor.launch = fail
        for iterator in iterators:
            with pytest.raises(RuntimeError, match="broken"):
                [output async for output in iterator]
        assert llm.is_running
        found = await outputs(llm, PROMPTS[1], params(), "next")
        assert found[-1].outputs[0].token_ids == greedy(shared_model()[1], PROMPTS[1], 12)

    run(test)


def test_shutdown_ends_all_iterators_and_refuses_new_ones() -> None:
    async def test(llm: AsyncLLM) -> None:
        await llm.check_health()
        iterator = llm.generate(PROMPTS[0], ENDLESS, "open")
        await anext(iterator)
        llm.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            [output async for output in iterator]
        with pytest.raises(EngineDeadError, match="shut down"):
            await outputs(llm, PROMPTS[0], params(), "late")
        with pytest.raises(EngineDeadError, match="shut down"):
            await llm.check_health()
        assert (llm.is_running, llm.errored) == (False, True)
        llm.shutdown()

    llm = make_async()
    asyncio.run(test(llm))
    assert is_idle(llm.engine)


def test_the_state_of_the_engine() -> None:
    async def test(llm: AsyncLLM) -> None:
        tokenizer = await llm.get_tokenizer()
        assert tokenizer.encode("the") == shared_llm().get_tokenizer().encode("the")
        assert llm.model_config.max_model_len == 512
        assert await llm.reset_prefix_cache()
        iterator = llm.generate(PROMPTS[0], ENDLESS, "open")
        await anext(iterator)
        await llm.sleep(level=1)
        assert await llm.is_sleeping()
        assert [output async for output in iterator][-1].outputs[0].finish_reason == "abort"
        with pytest.raises(ValueError, match="sleeps"):
            await outputs(llm, PROMPTS[0], params(), "sleeping")
        await llm.wake_up()
        assert not await llm.is_sleeping()
        found = await outputs(llm, PROMPTS[0], params(), "awake")
        assert found[-1].outputs[0].token_ids == greedy(shared_model()[1], PROMPTS[0], 12)
        with pytest.raises(ValueError, match="encode"):
            await llm.encode(PROMPTS[0])

    run(test)


def test_a_request_that_comes_while_the_engine_falls_asleep_is_refused() -> None:
    async def test(llm: AsyncLLM) -> None:
        sleeping = asyncio.create_task(llm.sleep(level=1))
        late = asyncio.create_task(outputs(llm, PROMPTS[0], ENDLESS, "late"))
        await sleeping
        with pytest.raises(ValueError, match="sleeps"):
            await late

    run(test)


def test_an_error_does_not_replace_the_last_output_of_a_request() -> None:
    """Another engine's step may fail after the request ended in its own engine."""

    async def test() -> None:
        thread = SimpleNamespace(undelivered={})
        found = AsyncOutputs("0", thread, newest_only=True)
        last = SimpleNamespace(finished=True)
        found.append(last)
        found.append(RuntimeError("a step failed"))
        deliver(thread.undelivered.popitem()[1])
        assert await found.get() is last

    asyncio.run(test())


def test_vllms_addresses() -> None:
    from nanovllm.engine.arg_utils import AsyncEngineArgs as FromArgUtils

    assert AsyncLLMEngine is AsyncLLM
    assert FromArgUtils is AsyncEngineArgs


def test_a_cache_salt_counts_with_tokenization_kwargs_too() -> None:
    async def test(llm: AsyncLLM) -> None:
        async def hits(salt: str) -> int:
            prompt = {"prompt_token_ids": list(range(40)), "cache_salt": salt}
            how = {"truncate_prompt_tokens": 40}
            found = llm.generate(prompt, params(FINAL_ONLY), salt, tokenization_kwargs=how)
            (count,) = [output.num_cached_tokens async for output in found]
            return count

        assert [await hits(salt) for salt in ("a", "a", "b")] == [0, 32, 0]

    run(test)
