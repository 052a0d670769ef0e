"""LLM.stream: what it shows and when, and that nothing is left of it however it ends."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
from tiny import (
    assert_idle,
    greedy,
    make_llm,
    nothing_is_left,  # noqa: F401
    random_prompts,
    scripted_model,
    shared_llm,
    shared_model,
)

from nanovllm import LLM, RequestOutputKind, SamplingParams

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
PROMPTS = random_prompts([5, 33, 90, 12], seed=41)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def llms() -> list[LLM]:
    tight = {
        "num_gpu_blocks_override": 9,
        "max_model_len": 130,
        "max_num_batched_tokens": 20,
        "max_num_seqs": 5,
    }
    return [
        shared_llm(async_scheduling=overlap, **kwargs)
        for overlap in (False, True)
        for kwargs in ({}, tight)
    ]


def with_kind(params: SamplingParams, kind: RequestOutputKind) -> SamplingParams:
    params = params.clone()
    params.output_kind = kind
    return params


def expected(prompt: list[int], num_tokens: int = 12) -> list[int]:
    return greedy(shared_model()[1], prompt, num_tokens)


def completions(llm: LLM, prompts: Any, params: SamplingParams) -> dict[tuple[int, int], list[Any]]:
    """What came of each completion, in order, by (request, index)."""
    found: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for out in llm.stream(prompts, params):
        for completion in out.outputs:
            found[int(out.request_id), completion.index].append(completion)
    first = min(request for request, _ in found)
    return {(request - first, index): parts for (request, index), parts in sorted(found.items())}


RANDOM = SamplingParams(max_tokens=20, n=2, seed=3, stop=["ab", "a!"])


@pytest.mark.parametrize("params", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_deltas_concatenate_to_what_generate_returns(params):
    for llm in llms():
        whole = llm.generate(PROMPTS, params, use_tqdm=False)
        found = completions(llm, PROMPTS, with_kind(params, DELTA))
        assert list(found) == [(i, j) for i in range(4) for j in range(params.n)]
        for (i, j), parts in found.items():
            end = whole[i].outputs[j]
            assert "".join(part.text for part in parts) == end.text
            assert [token for part in parts for token in part.token_ids] == end.token_ids
            assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
            assert (parts[-1].finish_reason, parts[-1].stop_reason) == (
                end.finish_reason,
                end.stop_reason,
            )


@pytest.mark.parametrize("params", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_cumulative_outputs_grow_to_what_generate_returns(params):
    for llm in llms():
        whole = llm.generate(PROMPTS, params, use_tqdm=False)
        for (i, j), parts in completions(llm, PROMPTS, with_kind(params, CUMULATIVE)).items():
            for before, after in pairwise(parts):
                assert after.text.startswith(before.text)
                assert after.token_ids[: len(before.token_ids)] == before.token_ids
            assert parts[-1] == whole[i].outputs[j]


def test_final_only_comes_once():
    for llm in llms():
        outs = list(llm.stream(PROMPTS, with_kind(RANDOM, FINAL_ONLY)))
        assert len({out.request_id for out in outs}) == len(outs) == 4
        assert all(out.finished for out in outs)


def test_tokens_come_as_they_are_made_and_requests_interleaved():
    llm = shared_llm()
    ids = [out.request_id for out in llm.stream(PROMPTS, with_kind(GREEDY, DELTA))]
    assert [ids.count(i) for i in sorted(set(ids))] == [12] * 4
    first = [ids.index(i) for i in sorted(set(ids))]
    assert max(first) < 12, "no request waits for another's end"


TEXT = "abc日de𝄞fgh"
BYTES = TEXT.encode()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        # One entry a token: the new text that may be shown.
        ([], ["b", "c", "", "", "日", "d", "e", "", "", "", "𝄞", "f", "g"]),
        (["x"], ["b", "c", "", "", "日", "d", "e", "", "", "", "𝄞", "f", "g"]),
        (["cdx"], ["b", "", "", "", "c日", "d", "e", "", "", "", "𝄞", "f", "g"]),
        (["日dX", "e𝄞f!"], ["b", "c", "", "", "", "", "日de"[:2], "", "", "", "", "", "e𝄞fg"]),
        (["d"], ["b", "c", "", "", "日", ""]),
        (["e𝄞f"], ["b", "c", "", "", "日", "d", "", "", "", "", "", ""]),
    ],
)
def test_half_characters_and_what_a_stop_string_may_take_back_are_held(stop, shown, overlap):
    llm = shared_llm_scripted(overlap)
    params = SamplingParams(temperature=0, max_tokens=13, stop=stop, output_kind=DELTA)
    assert [out["text"] for out in llm.stream("a", params)] == shown
    params.output_kind = CUMULATIVE
    texts = [out["text"] for out in llm.stream("a", params)]
    assert texts == ["".join(shown[: i + 1]) for i in range(len(shown))]


SCRIPTED: dict[bool, LLM] = {}


def shared_llm_scripted(overlap: bool) -> LLM:
    if overlap not in SCRIPTED:
        SCRIPTED[overlap] = make_llm(scripted_model(tuple(BYTES)), async_scheduling=overlap)
    return SCRIPTED[overlap]


@pytest.mark.parametrize("how", ["break", "close", "throw", "never begun", "dropped"])
def test_leaving_early_aborts_and_frees_every_block(how):
    for llm in llms():
        stream = llm.stream(PROMPTS, GREEDY)
        if how == "break":
            for i, _ in enumerate(stream):
                if i == 3:
                    break
            stream.close()
        elif how == "close":
            next(stream)
            stream.close()
            stream.close()
            assert list(stream) == []
        elif how == "throw":
            with pytest.raises(ZeroDivisionError):
                [1 / 0 for _ in stream]
            del stream
        elif how == "dropped":
            next(stream)
            del stream
        else:
            del stream
        assert_idle(llm)
        assert [out["token_ids"] for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == list(
            map(expected, PROMPTS)
        )


def test_a_loop_that_is_left_frees_its_requests_at_once():
    llm = shared_llm()
    for _ in llm.stream(PROMPTS, GREEDY):
        break
    assert_idle(llm)


def test_two_streams_and_a_generate_at_the_same_time():
    for llm in llms():
        one, two = (
            llm.stream(PROMPTS[:2], with_kind(GREEDY, DELTA)),
            llm.stream(PROMPTS[2:], with_kind(GREEDY, DELTA)),
        )
        got: dict[str, list[int]] = defaultdict(list)

        def take(stream: Any, count: int, got: dict[str, list[int]] = got) -> None:
            for _, out in zip(range(count), stream):
                got[out.request_id] += out["token_ids"]

        take(one, 3)
        take(two, 5)
        middle = llm.generate(PROMPTS[::-1], GREEDY, use_tqdm=False)
        take(two, 4)
        take(one, 1000)
        take(two, 1000)
        assert [got[key] for key in sorted(got, key=int)] == list(map(expected, PROMPTS))
        assert [out["token_ids"] for out in middle] == list(map(expected, PROMPTS[::-1]))
        assert_idle(llm)


def test_a_stream_whose_requests_are_taken_from_it_says_so():
    llm = shared_llm()
    stream = llm.stream(PROMPTS, GREEDY)
    first = next(stream)
    llm.llm_engine.abort_request(first.request_id)
    with pytest.raises(RuntimeError, match=f"requests {first.request_id} were aborted"):
        list(stream)
    assert_idle(llm)


def test_a_step_that_fails_ends_all_streams_and_leaves_a_usable_engine(monkeypatch):
    for llm in llms():
        one, two = llm.stream(PROMPTS[:2], GREEDY), llm.stream(PROMPTS[2:], GREEDY)
        next(one)
        with monkeypatch.context() as patch:
            patch.setattr(llm.llm_engine.output_processor, "take", fail)
            with pytest.raises(OSError, match="of the machine"):
                list(one)
        with pytest.raises(RuntimeError, match="were aborted, or dropped by a failed step"):
            list(two)
        assert list(one) == list(two) == []
        assert_idle(llm)
        assert [out["token_ids"] for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == list(
            map(expected, PROMPTS)
        )


def fail(*_: Any) -> None:
    raise OSError("of the machine")


def test_a_bad_prompt_is_refused_before_anything_runs():
    llm = shared_llm()
    with pytest.raises(ValueError, match="token id 999 is outside the vocabulary"):
        llm.stream([PROMPTS[0], [999]], GREEDY)
    assert_idle(llm)
    assert list(llm.stream([], GREEDY)) == []
