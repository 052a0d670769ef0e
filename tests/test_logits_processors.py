"""Custom logits processors: functions of one request and classes of one engine, against greedy
decoding worked out here from transformers' logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import (
    assert_idle,
    greedy,
    make_llm,
    next_logits,
    nothing_is_left,  # noqa: F401
    random_prompts,
    shared_llm,
    shared_model,
)

from nanovllm import SamplingParams
from nanovllm.sampling.engine_processors import Member, UserObjects
from nanovllm.sampling.interface import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
    process_dict_updates,
)

PROMPTS = random_prompts([3, 20, 7, 33], seed=41)
LENGTH = 8


def params_with(*functions: Callable[..., Any], **kwargs: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=LENGTH,
        ignore_eos=True,
        logits_processors=list(functions),
        **kwargs,
    )


def tokens_of(llm: Any, prompts: list[list[int]], params: Any) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


def greedy_with(prompt: list[int], change: Callable[..., torch.Tensor]) -> list[int]:
    """Greedy decoding whose logits are changed by `change(prompt, output, logits)`."""
    output: list[int] = []
    for _ in range(LENGTH):
        logits = next_logits(shared_model()[1], prompt + output)[-1]
        output.append(int(change(prompt, output, logits).argmax()))
    return output


def no_repeat(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """No token of the prompt or the answer comes again."""
    logits[prompt_ids + output_ids] = float("-inf")
    return logits


def no_echo(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """No token comes twice in an answer."""
    banned = torch.zeros_like(logits, dtype=torch.bool)
    banned[output_ids] = True
    return logits.masked_fill(banned, float("-inf"))


# -- functions of one request ----------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_function_sees_the_answer_so_far_and_changes_the_next_token(overlap):
    llm = shared_llm(async_scheduling=overlap)
    plain = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    params = [params_with(no_repeat), params_with(no_echo), plain, params_with(no_echo)]
    expected = [
        greedy_with(PROMPTS[0], no_repeat),
        greedy_with(PROMPTS[1], lambda _, output, logits: no_echo(output, logits)),
        greedy(shared_model()[1], PROMPTS[2], LENGTH),
        greedy_with(PROMPTS[3], lambda _, output, logits: no_echo(output, logits)),
    ]
    assert tokens_of(llm, PROMPTS, params) == expected


def test_functions_apply_in_order_with_preemption_and_chunks():
    llm = make_llm(
        num_gpu_blocks_override=9,
        max_model_len=130,
        max_num_batched_tokens=20,
        max_num_seqs=5,
        async_scheduling=True,
    )

    def plus(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits + (torch.arange(len(logits)) % (len(output_ids) + 2))

    def both(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        return no_repeat(prompt, output, plus(output, logits))

    prompts = random_prompts([40, 30, 20, 60], seed=42)
    found = tokens_of(llm, prompts, params_with(plus, no_repeat))
    assert found == [greedy_with(prompt, both) for prompt in prompts]


class ByCall:
    """An object that is called, with a default after its three arguments."""

    def __call__(
        self, prompt: list[int], output: list[int], logits: torch.Tensor, scale: int = 1
    ) -> torch.Tensor:
        logits[prompt[0]] = 1e9
        return logits


@pytest.mark.parametrize(
    "function",
    [
        ByCall(),
        lambda prompt, output, logits: ByCall()(prompt, output, logits),
        lambda output, logits, first=PROMPTS[0][0]: ByCall()([first], output, logits),
        lambda *given: ByCall()([PROMPTS[0][0]], *given),
    ],
)
def test_the_number_of_arguments_decides_what_a_function_gets(function):
    (found,) = tokens_of(shared_llm(), PROMPTS[:1], params_with(function))
    assert found == PROMPTS[0][:1] * LENGTH


def test_a_seeded_draw_is_the_same_with_a_function_that_changes_nothing():
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=LENGTH, n=2)
    same = params.clone()
    same.logits_processors = [lambda output, logits: logits]
    llm = shared_llm()
    answers = [
        [[c.token_ids for c in out.outputs] for out in llm.generate(PROMPTS, p, use_tqdm=False)]
        for p in (params, same)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, "must return a tensor of shape (300,); got NoneType"),
        (torch.zeros(7), "must return a tensor of shape (300,); got (7,)"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
    ids=["None", "shape", "raises"],
)
def test_an_error_in_a_function_ends_its_own_request_with_a_sentence(answer, sentence, overlap):
    def fails(output_ids: list[int], logits: torch.Tensor) -> Any:
        if len(output_ids) < 3:
            return logits
        if isinstance(answer, Exception):
            raise answer
        return answer

    llm = shared_llm(async_scheduling=overlap)
    params = [params_with(no_repeat), params_with(fails), params_with(no_repeat)]
    first, failed, third = llm.generate(PROMPTS[:3], params, use_tqdm=False)
    assert first["token_ids"] == greedy_with(PROMPTS[0], no_repeat)
    assert third["token_ids"] == greedy_with(PROMPTS[2], no_repeat)
    assert failed.outputs[0].finish_reason == "error"
    assert sentence in failed.outputs[0].stop_reason
    assert failed["token_ids"] == greedy(shared_model()[1], PROMPTS[1], 3)


def test_only_a_batch_that_has_a_function_waits_for_the_step_before(monkeypatch):
    llm = shared_llm(async_scheduling=True)
    engine = llm.llm_engine
    waited: list[bool] = []
    original = engine.scheduler.needs_previous_tokens
    monkeypatch.setattr(
        engine.scheduler,
        "needs_previous_tokens",
        lambda: waited.append(original()) or waited[-1],
    )
    plain = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm.generate(PROMPTS, plain, use_tqdm=False)
    assert waited
    assert not any(waited)
    llm.generate(PROMPTS[:1], params_with(no_echo), use_tqdm=False)
    assert any(waited)


@pytest.mark.parametrize(
    ("functions", "error", "message"),
    [
        (["mine"], TypeError, "logits_processors must be None or a list of functions"),
        (no_echo, TypeError, "logits_processors must be None or a list of functions"),
        ([lambda logits: logits], ValueError, "takes 1 arguments"),
        ([lambda a, b, c, d: d], ValueError, "takes 4 arguments"),
        ([LogitsProcessor], ValueError, r"classes belong to LLM\(logits_processors"),
    ],
)
def test_functions_of_another_form_are_refused_before_anything_runs(functions, error, message):
    with pytest.raises(error, match=message):
        shared_llm().generate(PROMPTS, SamplingParams(logits_processors=functions), use_tqdm=False)
    assert_idle(shared_llm())


# -- classes of one engine -------------------------------------------------------------------------


class BanFirst(LogitsProcessor):
    """Requests with extra_args={"ban": id} never get that token, nor what they have generated."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        ban = (sampling_params.extra_args or {}).get("ban", 0)
        if not isinstance(ban, int):
            raise ValueError(f"ban must be an int; got {ban!r}")

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        assert vllm_config.model_config.get_vocab_size() == 300
        assert device.type == "cpu"
        assert not is_pin_memory
        self.rows: dict[int, tuple[int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(
            self.rows,
            batch_update,
            lambda params, prompt, output: (
                (params.extra_args["ban"], output) if params.extra_args else None
            ),
        )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (ban, output) in self.rows.items():
            logits[row, [ban, *output]] = float("-inf")
        return logits


def banned_by(ban: int) -> Callable[..., torch.Tensor]:
    return lambda _, output, logits: no_echo([ban, *output], logits)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("by_name", [False, True], ids=["class", "name"])
def test_a_class_follows_its_requests_through_the_batch(by_name, overlap, monkeypatch):
    module = ModuleType("my_processors")
    module.BanFirst = BanFirst  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_processors", module)
    llm = make_llm(
        logits_processors=["my_processors:BanFirst" if by_name else BanFirst],
        async_scheduling=overlap,
        max_num_seqs=3,
    )
    prompts = random_prompts([3, 9, 20, 5, 7, 11, 4], seed=43)
    params = []
    expected = []
    for i, prompt in enumerate(prompts):  # of different lengths, so that rows are moved
        count = 2 + i % 4
        plain = greedy(shared_model()[1], prompt, LENGTH)
        extra = {"ban": plain[0]} if i % 3 else None
        params.append(
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, extra_args=extra)
        )
        text = greedy_with(prompt, banned_by(plain[0])) if extra else plain
        expected.append(text[:count])
    for _ in range(2):
        assert tokens_of(llm, prompts, params) == expected


def test_validate_params_refuses_a_request():
    llm = make_llm(logits_processors=[BanFirst])
    with pytest.raises(ValueError, match="ban must be an int; got 'x'"):
        llm.generate(PROMPTS, SamplingParams(extra_args={"ban": "x"}), use_tqdm=False)


class Adapter(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        return no_repeat if params.extra_args else None


def test_an_adapter_runs_functions_of_single_requests():
    llm = make_llm(logits_processors=[Adapter], async_scheduling=True)
    params = [
        SamplingParams(
            temperature=0, max_tokens=LENGTH, ignore_eos=True, extra_args={"on": 1} if on else None
        )
        for on in (True, False, True, False)
    ]
    expected = [
        greedy_with(prompt, no_repeat)
        if p.extra_args
        else greedy(shared_model()[1], prompt, LENGTH)
        for prompt, p in zip(PROMPTS, params)
    ]
    assert tokens_of(llm, PROMPTS, params) == expected


class Sharpen(LogitsProcessor):
    """Leaves only the largest logit. The largest stays the largest."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.seen: list[torch.Tensor] = []

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        self.seen.append(logits.clone())
        return logits.masked_fill(logits < logits.amax(-1, keepdim=True), float("-inf"))


def test_an_argmax_invariant_class_sees_logits_after_temperature_and_min_p_of_drawn_rows():
    llm = make_llm(logits_processors=[Sharpen])
    (prompt,) = PROMPTS[:1]
    warm = SamplingParams(temperature=0.5, min_p=0.1, max_tokens=1, ignore_eos=True)
    cold = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    (processor,) = llm.llm_engine.input_processor.facts.logits_processors.objects
    first = greedy(shared_model()[1], prompt, 1)
    assert tokens_of(llm, [prompt], cold) == [first]
    assert processor.seen == [], "greedy rows are left out"
    assert tokens_of(llm, [prompt], warm) == [first]
    expected = next_logits(shared_model()[1], prompt)[-1].double() / 0.5
    p = expected.softmax(-1)
    expected = expected.masked_fill(p < 0.1 * p.max(), float("-inf"))
    torch.testing.assert_close(processor.seen[0][0].double(), expected, atol=1e-3, rtol=1e-4)


class Broken(BanFirst):
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken processor")


def test_an_error_in_a_class_ends_the_step_and_the_engine_goes_on():
    """A class sees all rows at once, so an error does not tell whose it is."""
    llm = make_llm(logits_processors=[Broken])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken processor"):
            llm.generate(PROMPTS, SamplingParams(), use_tqdm=False)
        assert_idle(llm)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([no_echo], TypeError, "must be a class with the methods apply"),
        (["nowhere:Thing"], ValueError, "'nowhere:Thing' cannot be imported"),
        (["sys:Thing"], ValueError, "'sys:Thing' cannot be imported"),
        ([int], TypeError, "must be a class with the methods apply"),
        (BanFirst, TypeError, "must be None or a list of classes"),
    ],
)
def test_other_things_than_classes_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        make_llm(logits_processors=given)


def test_extra_args_are_refused_where_nothing_reads_them():
    with pytest.raises(ValueError, match="extra_args must be None or empty"):
        shared_llm().generate(PROMPTS, SamplingParams(extra_args={"a": 1}), use_tqdm=False)


# -- the batch as the objects know it --------------------------------------------------------------


def test_random_batches_are_told_so_that_rows_stay_with_their_requests():
    """The updates alone, replayed by vLLM's rules (removed, added, moved), give the batch."""
    generator = torch.Generator().manual_seed(5)
    user = UserObjects([])
    updates: list[BatchUpdate | None] = []

    class Record(Adapter):
        def update_state(self, batch_update: BatchUpdate | None) -> None:
            updates.append(batch_update)

    user.objects.append(Record(None, None, False))
    replayed: dict[int, int] = {}
    for step in range(200):
        picked = (torch.rand(12, generator=generator) < 0.6).nonzero().squeeze(1).tolist()
        if not picked:
            continue
        members = [
            Member(seq_id, SamplingParams(seed=seq_id), 2, torch.arange(3 + step).numpy())
            for seq_id in picked
        ]
        at = user.follow(members)
        update = updates[-1]
        if update is not None:
            assert update.batch_size == len(members)
            assert set(update.removed).isdisjoint(range(len(members)))
            process_dict_updates(replayed, update, lambda params, prompt, output: params.seed)
        assert [picked[i] for i in at] == [replayed[row] for row in range(len(members))]
        assert sorted(replayed) == list(range(len(members)))
        assert all(user.outputs[i] == list(range(2, 3 + step)) for i in picked)
        assert sorted(user.outputs) == picked


def test_a_swap_and_a_move_of_rows():
    rows = {0: "a", 1: "b", 3: "d"}
    update = BatchUpdate(
        3,
        removed=[1],
        added=[],
        moved=[(0, 2, MoveDirectionality.SWAP), (3, 1, MoveDirectionality.UNIDIRECTIONAL)],
    )
    assert process_dict_updates(rows, update, lambda *_: None)
    assert rows == {2: "a", 1: "d"}
    assert not process_dict_updates(rows, None, lambda *_: None)
