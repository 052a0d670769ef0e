"""vLLM's offline API as scripts use it: every form of a call, every refusal, and an engine that is
right afterwards.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    BOS,
    EOS,
    assert_idle,
    greedy,
    make_llm,
    nothing_is_left,  # noqa: F401
    random_prompts,
    shared_llm,
    shared_model,
    tiny_model,
    tiny_tokenizer,
)

import nanovllm
from nanovllm import LLM, BeamSearchParams, EngineArgs, LLMEngine, RequestOutputKind, SamplingParams
from nanovllm.errors import ValidationError, VLLMValidationError
from nanovllm.lora.request import LoRARequest

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = random_prompts([3, 20, 37], seed=61)


def expected(prompt: list[int], num_tokens: int = 8) -> list[int]:
    return greedy(shared_model()[1], prompt, num_tokens)


def tokens_of(llm: LLM, prompts: Any, params: Any = GREEDY, **kwargs: Any) -> list[list[int]]:
    return [
        out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False, **kwargs)
    ]


def assert_right(llm: LLM) -> None:
    """Nothing is left behind, and the next call gives transformers' tokens."""
    assert_idle(llm)
    assert tokens_of(llm, PROMPTS) == [expected(prompt) for prompt in PROMPTS]
    assert_idle(llm)


# -- forms of prompts and parameters ---------------------------------------------------------------


def test_all_forms_of_prompts_mixed():
    ids, text = PROMPTS[0], "the tin"
    encoded = [BOS, *tiny_tokenizer().encode(text, add_special_tokens=False)]
    prompts = [
        text,
        ids,
        {"prompt": text},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": ids, "prompt": "an echo"},
        nanovllm.TextPrompt(prompt=text),
        nanovllm.TokensPrompt(prompt_token_ids=ids),
        tuple(ids),
        np.array(ids),
        {"prompt": text, "multi_modal_data": None},
    ]
    outs = shared_llm().generate(prompts, GREEDY, use_tqdm=False)
    forms = (
        [(text, encoded), (None, ids)] * 2
        + [("an echo", ids), (text, encoded)]
        + [(None, ids)] * 3
        + [(text, encoded)]
    )
    assert [(out.prompt, out.prompt_token_ids) for out in outs] == forms
    assert [out["token_ids"] for out in outs] == [expected(token_ids) for _, token_ids in forms]
    assert all(out.finished and out.outputs[0].finished() for out in outs)


@pytest.mark.parametrize(
    "one", ["the", {"prompt": "the"}, [BOS, 257], (BOS, 257), np.array([BOS, 257])]
)
def test_one_prompt_need_not_be_in_a_list(one):
    assert tokens_of(shared_llm(), one) == [expected([BOS, 257])]


def test_no_prompts_no_outputs():
    llm = shared_llm()
    assert (
        llm.generate([], GREEDY)
        == llm.generate([])
        == llm.generate([], [GREEDY][:0])
        == llm.chat([])
        == []
    )


def test_former_keyword_prompt_token_ids():
    llm = shared_llm()
    whole = [expected(prompt) for prompt in PROMPTS]
    assert tokens_of(llm, None, prompt_token_ids=PROMPTS) == whole
    assert tokens_of(llm, None, prompt_token_ids=PROMPTS[0]) == whole[:1]
    outs = llm.generate(
        prompts=["a", "b", "c"], prompt_token_ids=PROMPTS, sampling_params=GREEDY, use_tqdm=False
    )
    assert [(out.prompt, out["token_ids"]) for out in outs] == list(zip("abc", whole))
    with pytest.raises(ValueError, match="prompts has 2 items and prompt_token_ids 3"):
        llm.generate(prompts=["a", "b"], prompt_token_ids=PROMPTS)


def test_one_set_of_parameters_for_each_prompt():
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 5, 1)]
    assert tokens_of(shared_llm(), PROMPTS, params) == [
        expected(p, n) for p, n in zip(PROMPTS, (2, 5, 1))
    ]
    assert tokens_of(shared_llm(), PROMPTS, tuple(params)) == tokens_of(
        shared_llm(), PROMPTS, params
    )


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        ),
        (
            {"min_p": 0.1, "repetition_penalty": 1.05, "max_new_tokens": 3},
            {"min_p": 0.1, "repetition_penalty": 1.05, "max_tokens": 3},
        ),
        # vLLM does not read do_sample.
        ({"do_sample": False, "max_new_tokens": 7}, {"max_tokens": 7}),
        ({"eos_token_id": 7}, {}),
    ],
)
def test_no_parameters_are_the_generation_configs(tmp_path, config, params):
    folder = shutil.copytree(shared_model()[0], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(config))
    llm = make_llm(str(folder))
    assert llm.get_default_sampling_params() == SamplingParams(**params)
    given = SamplingParams(**params, seed=5)
    llm.get_default_sampling_params = lambda: given
    assert tokens_of(llm, PROMPTS, None) == tokens_of(llm, PROMPTS, given)
    assert (
        make_llm(str(folder), generation_config="vllm").get_default_sampling_params()
        == SamplingParams()
    )


def test_request_ids_hold_integers_that_count_on():
    llm = shared_llm()
    first = [int(out.request_id) for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    second = [int(out.request_id) for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    assert first + second == list(range(first[0], first[0] + 6))


def test_the_callers_parameters_are_left_as_they_are():
    params = SamplingParams(max_tokens=3, top_k=1000, stop="x")
    before = params.clone()
    shared_llm().generate(PROMPTS, params, use_tqdm=False)
    assert params == before


# -- progress bars and interrupts ------------------------------------------------------------------


class Bar:
    """What stands in for tqdm: called with an iterable, or with total=."""

    made: list[Bar]

    def __init__(self, iterable: Any = None, **options: Any) -> None:
        self.iterable, self.options, self.count, self.closed = iterable, options, 0, False
        Bar.made.append(self)

    def __iter__(self) -> Any:
        for item in self.iterable:
            self.count += 1
            yield item

    def update(self, count: int) -> None:
        self.count += count

    def close(self) -> None:
        self.closed = True


def test_a_callable_in_the_place_of_tqdm():
    Bar.made = []
    outs = shared_llm().generate(PROMPTS, GREEDY, use_tqdm=Bar)
    adding, running = Bar.made
    assert adding.count == len(adding.iterable) == 3
    assert (running.options["total"], running.count, running.closed) == (3, 3, True)
    assert running.postfix.startswith("est. speed input: ")
    assert len(outs) == 3


def test_the_bar_shows_speeds(capsys):
    shared_llm().generate(PROMPTS, GREEDY)
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown
    assert "toks/s, output:" in shown


class Interrupting(Bar):
    at = "update"

    def __iter__(self) -> Any:
        for i, item in enumerate(self.iterable):
            if self.at == "adding" and i == 2:
                raise KeyboardInterrupt
            yield item

    def update(self, count: int) -> None:
        if self.at == "update":
            raise KeyboardInterrupt


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("at", ["adding", "update"])
def test_an_interrupt_in_the_progress_bar_leaves_a_usable_engine(at, overlap):
    llm = shared_llm(async_scheduling=overlap)
    Bar.made, Interrupting.at = [], at
    lengths = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 30, 40)]
    with pytest.raises(KeyboardInterrupt) as caught:
        llm.generate(PROMPTS, lengths, use_tqdm=Interrupting)
    assert_right(llm)  # while the traceback is still at hand
    del caught


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("when", [0, 4])
@pytest.mark.parametrize("where", ["schedule", "launch", "take", "outputs"])
def test_an_interrupt_in_a_step_leaves_a_usable_engine(where, when, overlap, monkeypatch):
    """Also where blocks are findable already whose tokens were never computed: none of them may be
    hit afterwards.
    """
    llm = make_llm(async_scheduling=overlap)
    engine = llm.llm_engine
    owner, name = {
        "schedule": (engine.scheduler, "schedule"),
        "launch": (engine.executor.runner, "launch"),
        "take": (engine.output_processor, "take"),
        "outputs": (engine.output_processor, "outputs"),
    }[where]
    original, calls = getattr(owner, name), iter(range(100))

    def interrupted(*args: Any) -> Any:
        result = original(*args)
        if next(calls) == when:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert_right(llm)


# -- chat ------------------------------------------------------------------------------------------


MESSAGES = [{"role": "user", "content": "the tin"}]
RENDERED = "<s>[user] the tin</s>[assistant] "


def test_chat_writes_bos_once():
    (out,) = shared_llm().chat(MESSAGES, GREEDY, use_tqdm=False)
    assert out.prompt == RENDERED
    assert out.prompt_token_ids == tiny_tokenizer().encode(RENDERED, add_special_tokens=False)
    assert out.prompt_token_ids.count(BOS) == 1
    assert out["token_ids"] == expected(out.prompt_token_ids)


def test_chat_of_several_conversations_with_parameters_each():
    other = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "in"},
        {"role": "assistant", "content": "h"},
    ]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 4)]
    outs = shared_llm().chat([MESSAGES, other], params, use_tqdm=False)
    assert [out.prompt for out in outs] == [
        RENDERED,
        "<s>[system] be</s>[user] in</s>[assistant] h</s>[assistant] ",
    ]
    assert [len(out["token_ids"]) for out in outs] == [2, 4]


def test_chat_options(tmp_path):
    llm = shared_llm()

    def prompt(**kwargs: Any) -> str:
        return llm.chat(kwargs.pop("messages", MESSAGES), GREEDY, use_tqdm=False, **kwargs)[
            0
        ].prompt

    assert prompt(add_generation_prompt=False) == "<s>[user] the tin</s>"
    begun = [*MESSAGES, {"role": "assistant", "content": "on"}]
    assert prompt(
        messages=begun, add_generation_prompt=False, continue_final_message=True
    ).endswith("[assistant] on")
    template = (
        "{% for m in messages %}{{ m.content }}|{% endfor %}{{ tone }}{{ (tools or []) | length }}"
    )
    assert (
        prompt(chat_template=template, chat_template_kwargs={"tone": "!"}, tools=[{}, {}])
        == "the tin|!2"
    )
    (tmp_path / "template.jinja").write_text(template)
    assert prompt(chat_template=str(tmp_path / "template.jinja"), tools=[{}]) == "the tin|1"
    assert (
        make_llm(chat_template=template).chat(MESSAGES, GREEDY, use_tqdm=False)[0].prompt
        == "the tin|0"
    )
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "tin"}],
        }
    ]
    assert prompt(messages=parts) == "<s>[user] the\ntin</s>[assistant] "


@pytest.mark.parametrize(
    ("messages", "options", "error", "message"),
    [
        (
            [{"role": "stranger", "content": ""}],
            {},
            ValueError,
            "cannot render them: who is stranger?",
        ),
        (MESSAGES, {"continue_final_message": True}, ValueError, "cannot render them"),
        (MESSAGES, {"chat_template": "{% for"}, ValueError, "cannot render them"),
        (
            MESSAGES,
            {"chat_template_content_format": "json"},
            ValueError,
            "accepted: 'auto', 'string', 'openai'",
        ),
        ([["text"]], {}, TypeError, "a message must be a dict"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            {},
            ValueError,
            "only parts of type 'text'",
        ),
    ],
)
def test_chat_refuses(messages, options, error, message):
    with pytest.raises(error, match=message):
        shared_llm().chat(messages, GREEDY, use_tqdm=False, **options)
    assert_right(shared_llm())


def test_chat_without_a_template_or_a_tokenizer():
    llm = make_llm()
    llm.get_tokenizer().chat_template = None
    with pytest.raises(ValueError, match="no chat template; pass chat_template="):
        llm.chat(MESSAGES, GREEDY)
    with pytest.raises(ValueError, match="chat needs a tokenizer"):
        shared_llm(skip_tokenizer_init=True).chat(MESSAGES, GREEDY)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        ([PROMPTS[0], []], GREEDY, ValueError, "prompt: it has no tokens"),
        ([PROMPTS[0], [300]], GREEDY, ValueError, "token id 300 is outside the vocabulary, 0..299"),
        ([PROMPTS[0], [5, -1]], GREEDY, ValueError, "token id -1"),
        ([PROMPTS[0], [2**40]], GREEDY, ValueError, "token id 1099511627776"),
        ([PROMPTS[0], [2**70]], GREEDY, TypeError, "flat list of int"),
        (
            [PROMPTS[0], [1] * 512],
            GREEDY,
            ValueError,
            "512 tokens, and max_model_len=512 must hold it and at least one",
        ),
        ([PROMPTS[0], [1] * 600], GREEDY, ValueError, "600 tokens"),
        ([PROMPTS[0], [1.5]], GREEDY, TypeError, "flat list of int"),
        ([PROMPTS[0], [[1]]], GREEDY, TypeError, "flat list of int"),
        ([PROMPTS[0], [True, False]], GREEDY, TypeError, "flat list of int"),
        ([PROMPTS[0], ["a"]], GREEDY, TypeError, "flat list of int"),
        ([PROMPTS[0], None], GREEDY, TypeError, "got NoneType"),
        ([PROMPTS[0], {}], GREEDY, TypeError, "a dict needs 'prompt' or 'prompt_token_ids'"),
        ([PROMPTS[0], {"text": "a"}], GREEDY, TypeError, r"got the keys \['text'\]"),
        ([PROMPTS[0], {"prompt": 5}], GREEDY, TypeError, "text must be a str, got int"),
        (
            [{"prompt": "a", "multi_modal_data": {"image": 1}}],
            GREEDY,
            ValueError,
            "multi_modal_data.* not supported",
        ),
        (None, GREEDY, TypeError, "prompts is missing"),
        (5, GREEDY, TypeError, "got 5"),
        (b"bytes", GREEDY, TypeError, "got b'bytes'"),
        (PROMPTS, [GREEDY], ValueError, "sampling_params has 1 items for 3 prompts"),
        (
            PROMPTS,
            {"temperature": 0},
            TypeError,
            "must be SamplingParams or a list of them, got dict",
        ),
        (PROMPTS, [GREEDY, GREEDY, {}], TypeError, "must be SamplingParams, got dict"),
        (PROMPTS, [GREEDY, None, GREEDY], TypeError, "must be SamplingParams, got NoneType"),
        (PROMPTS, BeamSearchParams(2, 2), TypeError, "got BeamSearchParams"),
        (
            PROMPTS,
            [GREEDY, GREEDY, SamplingParams(logprobs=21)],
            ValueError,
            "logprobs must be at most max_logprobs=20",
        ),
        (
            PROMPTS,
            [GREEDY, GREEDY, SamplingParams(prompt_logprobs=-1)],
            ValueError,
            "prompt_logprobs must be at most",
        ),
        (
            PROMPTS,
            [GREEDY, GREEDY, SamplingParams(logit_bias={300: 1.0})],
            ValueError,
            "logit_bias .*inside the voc",
        ),
        (
            PROMPTS,
            [GREEDY, GREEDY, SamplingParams(allowed_token_ids=[-1])],
            ValueError,
            "allowed_token_ids .*inside",
        ),
        (
            PROMPTS,
            [GREEDY, GREEDY, SamplingParams(stop_token_ids=[999])],
            ValueError,
            "stop_token_ids .*inside",
        ),
    ],
)
@pytest.mark.parametrize("overlap", [False, True])
def test_one_bad_request_is_refused_and_those_before_it_aborted(
    prompts, params, error, message, overlap
):
    llm = shared_llm(async_scheduling=overlap)
    with pytest.raises(error, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert_right(llm)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temperature", -1, ValueError),
        ("top_p", 0, ValueError),
        ("top_k", -2, ValueError),
        ("n", 0, ValueError),
        ("max_tokens", 0, ValueError),
        ("min_tokens", 9, ValueError),
        ("stop", [""], ValueError),
        ("logprobs", "3", TypeError),
        ("allowed_token_ids", [], ValueError),
        ("output_kind", "delta", TypeError),
        ("structured_outputs", object(), ValueError),
    ],
)
def test_parameters_changed_after_construction_are_checked_when_a_request_is_added(
    name, value, error
):
    params = GREEDY.clone()
    setattr(params, name, value)
    with pytest.raises(error, match=name):
        shared_llm().stream(PROMPTS, params)
    assert_right(shared_llm())


def test_parameters_changed_after_construction_are_brought_to_one_form():
    (prompt,) = PROMPTS[:1]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    params.temperature, params.top_p, params.logprobs = 1e-6, 0.5, True
    (out,) = shared_llm().generate([prompt], params, use_tqdm=False)
    assert out["token_ids"] == expected(prompt)
    assert len(out.outputs[0].logprobs[0]) == 1
    params.stop = "x"
    shared_llm().generate([prompt], params, use_tqdm=False)


def test_our_own_error_is_a_value_error_that_carries_parameter_and_value():
    with pytest.raises(VLLMValidationError) as caught:
        shared_llm().generate(PROMPTS, SamplingParams(logprobs=50), use_tqdm=False)
    assert isinstance(caught.value, ValueError)
    assert (caught.value.parameter, caught.value.value) == ("logprobs", 50)
    assert VLLMValidationError is ValidationError


def test_adapters_and_priorities():
    llm = shared_llm()
    adapter = LoRARequest("sql", 1, "/nowhere")
    for nothing in (None, [], [None, None, None]):
        assert tokens_of(llm, PROMPTS, lora_request=nothing, priority=[0, 0, 0]) == [
            expected(p) for p in PROMPTS
        ]
    for something in (adapter, [None, adapter, None]):
        with pytest.raises(ValueError, match="lora_request needs an engine with enable_lora=True"):
            llm.generate(PROMPTS, GREEDY, lora_request=something)
    with pytest.raises(ValueError, match=r"priority.* needs LLM\(scheduling_policy='priority'\)"):
        llm.generate(PROMPTS, GREEDY, priority=[0, 1, 0])


@pytest.mark.parametrize("overlap", [False, True])
def test_with_the_policy_priority_lower_values_finish_first(overlap):
    llm = shared_llm(scheduling_policy="priority", max_num_seqs=1, async_scheduling=overlap)
    engine = llm.llm_engine
    priorities = [3, 1, 2, 1]
    for i, priority in enumerate(priorities):
        engine.add_request(str(i), PROMPTS[i % 3], GREEDY, priority=priority)
    finished = []
    while engine.has_unfinished_requests():
        finished += [out.request_id for out in engine.step() if out.finished]
    assert finished == ["1", "3", "2", "0"]
    for priority in (None, 1, [3, -1, 0]):
        assert tokens_of(llm, PROMPTS, priority=priority) == [expected(p) for p in PROMPTS]
    for priority, error in ((["high"] * 3, TypeError), ([1], ValueError), (0.5, TypeError)):
        with pytest.raises(error, match="priority"):
            llm.generate(PROMPTS, GREEDY, priority=priority)


def test_a_cache_salt_separates_cached_prefixes():
    llm = make_llm()
    tokens = list(range(40))

    def hits(salt: str | None, **kwargs: Any) -> int:
        prompt = {"prompt_token_ids": tokens, "cache_salt": salt}
        (out,) = llm.generate([prompt], GREEDY, use_tqdm=False, **kwargs)
        assert out["token_ids"] == expected(tokens)
        return out.num_cached_tokens

    assert [hits(salt) for salt in (None, None, "a", "a", "b")] == [0, 32, 0, 32, 0]
    assert hits("b", tokenization_kwargs={"truncate_prompt_tokens": 40}) == 32
    for salt, error in (("", ValueError), (7, TypeError)):
        with pytest.raises(error, match="cache_salt"):
            hits(salt)
    params = BeamSearchParams(beam_width=2, max_tokens=2)
    llm.beam_search([{"prompt_token_ids": tokens, "cache_salt": "beams"}], params)
    assert [hits(salt) for salt in ("c", "beams")] == [0, 32]


def test_override_generation_config_lies_over_the_file(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 5, "temperature": 0.3}))
    override = {"temperature": 0, "max_new_tokens": 3}
    llm = make_llm(generation_config=str(tmp_path), override_generation_config=override)
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.max_tokens) == (0, 3)
    llm = make_llm(generation_config="vllm", override_generation_config={"top_k": 7})
    assert llm.get_default_sampling_params() == SamplingParams(top_k=7)
    llm = make_llm(override_generation_config={"top_k": "many"})
    with pytest.raises(ValueError, match="override_generation_config: top_k='many'"):
        llm.get_default_sampling_params()


def test_a_kv_cache_of_another_dtype_than_the_model_is_refused():
    with pytest.raises(ValueError, match="kv_cache_dtype='bfloat16' is another dtype"):
        make_llm(kv_cache_dtype="bfloat16")


def test_text_needs_a_tokenizer():
    llm = shared_llm(skip_tokenizer_init=True)
    assert llm.get_tokenizer() is None
    for params in (
        GREEDY,
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1),
    ):
        (out,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
        assert (out["text"], out["token_ids"]) == ("", expected(PROMPTS[0]))
    for prompts, params in (
        ("text", GREEDY),
        (PROMPTS, SamplingParams(stop="a")),
        (PROMPTS, SamplingParams(bad_words=["a"])),
    ):
        with pytest.raises(ValueError, match="skip_tokenizer_init=True"):
            llm.generate(prompts, params, use_tqdm=False)
    assert_right(llm)


# -- arguments of LLM ------------------------------------------------------------------------------


def test_arguments_without_effect_and_neutral_values_are_accepted():
    args = {
        "trust_remote_code": True,
        "swap_space": 4,
        "enforce_eager": True,
        "pipeline_parallel_size": 1,
        "quantization": None,
        "kv_cache_dtype": "float32",
        "enable_lora": False,
        "speculative_config": None,
        "compilation_config": {"level": 3},
        "disable_custom_all_reduce": True,
        "task": "generate",
        "worker_extension_cls": "",
        "max_lora_rank": 64,
        "model_impl": "vllm",
        "limit_mm_per_prompt": {"image": 0, "video": {"count": 0}},
        "language_model_only": True,
        "mm_encoder_tp_mode": "data",
        "load_format": "fastsafetensors",
        "scheduling_policy": "fcfs",
        "tensor_parallel_size": None,
    }
    assert tokens_of(make_llm(**args), PROMPTS) == [expected(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pipeline_parallel_size", 2),
        ("quantization", "awq"),
        ("kv_cache_dtype", "int3"),
        ("max_lora_rank", 0),
        ("lora_dtype", "int8"),
        ("speculative_config", {"method": "ngram"}),
        ("task", "embed"),
        ("scheduling_policy", "random"),
        ("limit_mm_per_prompt", {"image": 0, "video": 1}),
        ("step_timeout", 0),
        ("rope_scaling", {"type": "linear"}),
        ("worker_extension_cls", "my.Worker"),
        ("load_format", "pt"),
        ("tokenizer_mode", "mistral"),
        ("logprobs_mode", "raw"),
        ("generation_config", "/elsewhere"),
        ("dtype", "int8"),
        ("gpu_memory_utilization", 1.5),
        ("max_num_seqs", 0),
        ("max_logprobs", -2),
    ],
)
def test_arguments_that_would_change_results_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        EngineArgs("model", **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "max_model_length",
            10,
            TypeError,
            "unexpected keyword argument 'max_model_length'; did you mean 'max_model_len'?",
        ),
        ("gpu_memory_utilisation", 0.5, TypeError, "did you mean 'gpu_memory_utilization'?"),
        ("zzzzzz", 1, TypeError, "unexpected keyword argument 'zzzzzz'$"),
        ("max_num_seqs", "8", TypeError, "max_num_seqs='8' must be an int"),
        ("max_num_seqs", True, TypeError, "must be an int"),
        ("seed", 1.5, TypeError, "seed=1.5 must be an int"),
        ("model", 5, TypeError, "model=5 must be"),
    ],
)
def test_unknown_names_and_wrong_types(name, value, error, message):
    with pytest.raises(error, match=message):
        LLM(**{"model": "model", name: value})


def test_dtype_in_torchs_own_words_and_nano_vllms_names():
    assert (
        EngineArgs("m", dtype=torch.float16).dtype
        == EngineArgs("m", dtype="half").dtype
        == "float16"
    )
    assert EngineArgs("m", kvcache_block_size=256).block_size == 256
    assert EngineArgs(Path("m")).model == "m"


@pytest.mark.parametrize(("asked", "size"), [(None, 16), (32, 32)])
def test_blocks_on_a_cpu_have_16_tokens_by_default(asked, size):
    assert make_llm(block_size=asked).llm_engine.scheduler.block_size == size


# -- the engine's state ----------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_weights_and_cache_and_wake_up_brings_them_back(level):
    llm = make_llm()
    assert_right(llm)
    model = llm.llm_engine.executor.runner.model
    sizes = [parameter.shape for parameter in model.parameters()]
    llm.sleep(level)
    llm.sleep(level)
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    with pytest.raises(
        ValueError, match=r"the engine sleeps \(kv_cache and weights are freed\): call wake_up"
    ):
        llm.generate(PROMPTS, GREEDY)
    llm.wake_up(tags=["weights"])
    assert [parameter.shape for parameter in model.parameters()] == sizes
    with pytest.raises(ValueError, match=r"\(kv_cache are freed\)"):
        llm.generate(PROMPTS, GREEDY)
    llm.wake_up(["kv_cache"])
    llm.wake_up()
    assert_right(llm)
    llm.sleep()
    llm.wake_up()
    assert_right(llm)


def test_sleep_refuses():
    llm = shared_llm()
    with pytest.raises(ValueError, match="level=3 is not known"):
        llm.sleep(3)
    with pytest.raises(ValueError, match="tags="):
        llm.wake_up(["everything"])
    stream = llm.stream(PROMPTS, GREEDY)
    with pytest.raises(ValueError, match="3 requests are unfinished"):
        llm.sleep()
    stream.close()
    assert_right(llm)


def test_new_weights_in_the_running_model(tmp_path):
    _, other = tiny_model(tmp_path, "Qwen3", rms_norm_eps=1e-5)
    llm = make_llm()
    (long,) = random_prompts([64], seed=62)
    assert tokens_of(llm, [*PROMPTS, long])[:3] == [expected(prompt) for prompt in PROMPTS]
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    assert model.load_weights(other.state_dict().items()) == set(other.state_dict())
    assert llm.reset_prefix_cache()
    other.config.rms_norm_eps = 1e-6
    for layer in other.modules():
        if hasattr(layer, "variance_epsilon"):
            layer.variance_epsilon = 1e-6
    assert tokens_of(llm, [*PROMPTS, long]) == [
        greedy(other, prompt, 8) for prompt in [*PROMPTS, long]
    ]
    with pytest.raises(ValueError, match="no parameter"):
        model.load_weights([("model.nothing.weight", torch.zeros(1))])


def test_collective_rpc_and_apply_model():
    llm = shared_llm()
    assert llm.collective_rpc(
        lambda worker, a, b=0: (worker.rank, a + b), args=(1,), kwargs={"b": 2}
    ) == [(0, 3)]
    (parameters,) = llm.apply_model(lambda model: sum(1 for _ in model.parameters()))
    assert parameters > 10
    with pytest.raises(ValueError, match="no method 'nonsense'"):
        llm.collective_rpc("nonsense")
    assert_right(llm)


def test_another_tokenizer():
    llm = make_llm()
    other = tiny_tokenizer()
    other.add_tokens(["zzz"])
    llm.set_tokenizer(other)
    assert llm.get_tokenizer() is other
    assert llm.llm_engine.get_tokenizer() is other
    (out,) = llm.generate("a", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert out["text"] == other.decode([97, *out["token_ids"]], skip_special_tokens=True)[1:]


def test_attributes_that_clients_touch():
    engine = shared_llm(max_model_len=100).llm_engine
    assert engine.model_config.max_model_len == 100
    assert engine.model_config.hf_config.hidden_size == 64
    assert engine.model_config.dtype == torch.float32
    assert engine.model_config.get_vocab_size() == 300
    assert engine.scheduler_config.max_num_seqs == 64
    assert engine.scheduler_config.max_num_batched_tokens == 256
    assert isinstance(engine.model_executor.driver_worker.model_runner.model, torch.nn.Module)


def metrics(llm: LLM) -> dict[str, float]:
    return {metric.name.removeprefix("vllm:"): metric.value for metric in llm.get_metrics()}


@pytest.mark.parametrize("overlap", [False, True])
def test_metrics_count_tokens_over_all_calls(overlap):
    llm = make_llm(async_scheduling=overlap)
    for calls in (1, 2):
        llm.generate(PROMPTS, SamplingParams(max_tokens=5, n=2, ignore_eos=True), use_tqdm=False)
        found = metrics(llm)
        assert found["prompt_tokens"] == found["prefix_cache_queries"] == calls * 2 * 60
        assert found["generation_tokens"] == calls * 3 * 2 * 5
    # Of 3, 20 and 37 tokens 0, 1 and 2 blocks of 16 are full.
    assert found["prefix_cache_hits"] == 3 * 48
    assert (
        found["num_requests_running"]
        == found["num_requests_waiting"]
        == found["kv_cache_usage_perc"]
        == 0
    )
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)
    assert metrics(llm)["num_requests_running"] == 3
    assert 0 < metrics(llm)["kv_cache_usage_perc"] < 1
    stream.close()
    llm.sleep()
    llm.wake_up()
    assert metrics(llm)["prompt_tokens"] >= 300, "they outlive the scheduler"


@pytest.mark.parametrize("overlap", [False, True])
def test_an_output_carries_times_when_stats_are_on(overlap):
    llm = make_llm(
        disable_log_stats=False,
        async_scheduling=overlap,
        num_gpu_blocks_override=10,
        max_model_len=100,
    )
    prompts = PROMPTS * 4
    for out in llm.generate(
        prompts, SamplingParams(max_tokens=20, n=2, ignore_eos=True, seed=1), use_tqdm=False
    ):
        m = out.metrics
        assert (
            m.arrival_time
            <= m.first_scheduled_time
            <= m.first_token_time
            <= m.last_token_time
            == m.finished_time
        )
        assert m.num_generation_tokens == 40
    assert llm.llm_engine.stats.num_preemptions > 0
    assert [out.metrics for out in shared_llm().generate(PROMPTS, GREEDY, use_tqdm=False)] == [
        None
    ] * 3


# -- LLMEngine by itself ---------------------------------------------------------------------------


def make_engine(**kwargs: Any) -> LLMEngine:
    args = EngineArgs(
        model=shared_model()[0], dtype="float32", num_gpu_blocks_override=64, **kwargs
    )
    return LLMEngine.from_engine_args(args)


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_may_come_and_go_between_steps(overlap):
    engine = make_engine(async_scheduling=overlap)
    assert not engine.has_unfinished_requests()
    assert engine.step() == []
    final = GREEDY.clone()
    final.output_kind = RequestOutputKind.FINAL_ONLY
    engine.add_request("a", PROMPTS[0], final)
    engine.add_request("gone", PROMPTS[1], final)
    with pytest.raises(ValueError, match="request_id='a' is in use"):
        engine.add_request("a", PROMPTS[1], final)
    with pytest.raises(TypeError, match="request_id=5 must be a str"):
        engine.add_request(5, PROMPTS[1], final)
    found = {}
    for i in range(60):
        if i == 2:
            engine.add_request("b", {"prompt_token_ids": PROMPTS[2]}, GREEDY)
            assert engine.get_num_unfinished_requests() == 3
        if i == 4:
            engine.abort_request(["gone", "never there"])
            engine.abort_request("gone")
        for out in engine.step():
            found.setdefault(out.request_id, []).append(out)
        if i > 4 and not engine.has_unfinished_requests():
            break
    assert found.keys() == {"a", "b"}
    assert (len(found["a"]), len(found["b"])) == (1, 8)
    assert found["a"][-1]["token_ids"] == expected(PROMPTS[0])
    assert found["b"][-1]["token_ids"] == expected(PROMPTS[2])
    assert [out.finished for out in found["b"]] == [False] * 7 + [True]
    assert engine.step() == []
    assert engine.scheduler.blocks.num_free == 64


@pytest.mark.parametrize("overlap", [False, True])
def test_abort_at_any_step_frees_every_block(overlap):
    engine = make_engine(async_scheduling=overlap, max_num_batched_tokens=16, max_num_seqs=4)
    for steps in range(14):
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(str(i), prompt, SamplingParams(max_tokens=10, n=2, ignore_eos=True))
        for _ in range(steps):
            engine.step()
        engine.abort_request(["0", "1", "2"])
        assert engine.scheduler.blocks.num_free == 64
        assert not engine.has_unfinished_requests()
        engine.add_request("right", PROMPTS[1], GREEDY)
        outs = []
        while engine.has_unfinished_requests():
            outs += engine.step()
        assert outs[-1]["token_ids"] == expected(PROMPTS[1])


# -- imports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "nanovllm",
            "LLM SamplingParams RequestOutput CompletionOutput LLMEngine EngineArgs TextPrompt TokensPrompt",
        ),
        (
            "nanovllm.sampling_params",
            "SamplingParams BeamSearchParams RequestOutputKind StructuredOutputsParams",
        ),
        ("nanovllm.outputs", "RequestOutput CompletionOutput"),
        ("nanovllm.engine.llm_engine", "LLMEngine"),
        ("nanovllm.engine.arg_utils", "EngineArgs"),
        ("nanovllm.lora.request", "LoRARequest"),
        ("nanovllm.inputs", "TextPrompt TokensPrompt"),
    ],
)
def test_names_are_where_vllms_scripts_import_them_from(module, names):
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in names.split())


def test_the_import_is_cheap_and_touches_no_device():
    code = (
        "import sys, nanovllm, torch\n"
        "from nanovllm import *\n"
        "assert set(nanovllm.__all__) <= set(dir(nanovllm))\n"
        "heavy = {'transformers', 'tokenizers', 'huggingface_hub', 'triton', 'gguf', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(nanovllm.__file__).parents[1])


def test_eos_ends_a_text_of_the_real_vocabulary():
    """A random model, its own EOS drawn at last: the one test here in which nothing is forced."""
    params = SamplingParams(max_tokens=400, temperature=1.5, seed=3)
    (out,) = shared_llm().generate([PROMPTS[0]], params, use_tqdm=False)
    assert (out.outputs[0].finish_reason, out["token_ids"].count(EOS)) == ("stop", 1)
    assert out["token_ids"][-1] == EOS
