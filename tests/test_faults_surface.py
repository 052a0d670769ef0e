"""Faults of the surface that users found, each with its smallest input and its right value, and
more inputs of its kind.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    BOS,
    assert_idle,
    make_llm,
    nothing_is_left,  # noqa: F401
    random_prompts,
    scripted_model,
    shared_llm,
    tiny_tokenizer,
)
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nanovllm import BeamSearchParams, RequestOutputKind, SamplingParams

ONE = SamplingParams(temperature=0, max_tokens=1)


def chat_prompt(messages: Any, template: str | None = None, **kwargs: Any) -> str:
    (out,) = shared_llm().chat(messages, ONE, use_tqdm=False, chat_template=template, **kwargs)
    return out.prompt


# -- F6: arguments of tool calls -------------------------------------------------------------------

ARGUMENTS = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% for c in m.tool_calls %}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% else %}-{% endif %}{% endfor %}"
)


def tool_message(*arguments: Any) -> dict[str, Any]:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "mul", "arguments": a}}
        for a in arguments
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (['{"a": 3}'], '{"a": 3}'),
        ([{"a": 3}], '{"a": 3}'),
        ([None, "", " \n"], "{}{}{}"),
        (["null", "{}"], "{}{}"),
        (['{"a": {"b": [1, "é"]}}', '{"c": null}'], '{"a": {"b": [1, "é"]}}{"c": null}'),
    ],
)
def test_arguments_of_tool_calls_are_dicts(arguments, text):
    messages = [{"role": "user", "content": "?"}, tool_message(*arguments)]
    before = copy.deepcopy(messages)
    assert chat_prompt(messages, ARGUMENTS) == "-" + text
    assert messages == before


def test_a_template_that_walks_over_arguments():
    walk = (
        "{% for m in messages %}{% for c in m.tool_calls %}{% for k, v in c.function.arguments | items %}"
        "{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}"
    )
    assert chat_prompt([tool_message('{"a": 3, "b": "x"}')], walk) == "a=3;b=x;"


@pytest.mark.parametrize("calls", [[], None, ()])
def test_no_tool_calls_are_no_key(calls):
    message = {"role": "assistant", "content": "a", "tool_calls": calls}
    assert chat_prompt([message], ARGUMENTS) == "-"
    assert "tool_calls" in message


def test_tool_calls_without_a_function_name_arguments():
    assert (
        chat_prompt(
            [{"role": "assistant", "tool_calls": [{"function": {"name": "now"}}]}], ARGUMENTS
        )
        == "{}"
    )


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        (tool_message('{"a": '), ValueError, "is no JSON"),
        (tool_message("[1]"), ValueError, "must be a dict or JSON text of one"),
        (tool_message([1]), ValueError, "must be a dict or JSON text of one"),
        (
            {"role": "assistant", "tool_calls": ["f"]},
            ValueError,
            "must be a dict of type 'function'",
        ),
        (
            {"role": "assistant", "tool_calls": [{"type": "custom", "function": {}}]},
            ValueError,
            "of type 'function'",
        ),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, ValueError, "of type 'function'"),
        ({"role": "assistant", "tool_calls": {"function": {}}}, TypeError, "must be a list"),
    ],
)
def test_tool_calls_that_are_none(message, error, text):
    with pytest.raises(error, match=text):
        chat_prompt([message], ARGUMENTS)


# -- F7: chat's template arguments and parts -------------------------------------------------------


def test_chat_template_kwargs_replace_arguments():
    messages = [{"role": "user", "content": "the"}]
    assert (
        chat_prompt(messages, chat_template_kwargs={"add_generation_prompt": False})
        == "<s>[user] the</s>"
    )
    shown = "{{ tools | length }}{{ tone }}{{ enable_thinking }}"
    assert (
        chat_prompt(
            messages, shown, chat_template_kwargs={"tools": [{}], "tone": "!"}, tools=[{}, {}]
        )
        == "1!"
    )
    assert (
        chat_prompt(messages, shown, chat_template_kwargs={"enable_thinking": False}, tools=[{}])
        == "1False"
    )
    begun = [*messages, {"role": "assistant", "content": "on"}]
    kwargs = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat_prompt(begun, chat_template_kwargs=kwargs).endswith("[assistant] on")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "conversation"])
def test_chat_template_kwargs_that_chat_sets_itself(name):
    with pytest.raises(ValueError, match=f"chat_template_kwargs may not hold {name}"):
        chat_prompt([{"role": "user", "content": "the"}], chat_template_kwargs={name: "x"})


STRING = "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}"
OPENAI = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m['content'] %}"
    "{% if part.type == 'text' %}{{ part.text }};{% endif %}{% endfor %}|{% endfor %}"
)
BOTH = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }};{% endfor %}{% endif %}|{% endfor %}"
)
MACRO = (
    "{% macro show(it) %}{% for part in it %}{{ part.text }};{% endfor %}{% endmacro %}"
    "{% set ns = namespace(rest=messages) %}{% for m in ns.rest %}[{{ m.role }}]{{ show(m.content) }}|{% endfor %}"
)
PARTS = [
    "a",
    {"type": "text", "text": "b"},
    {"type": "input_text", "text": "c"},
    {"type": "output_text", "text": "d"},
]
EVERY = [
    {"role": "system", "content": "one"},
    {"role": "user", "content": PARTS},
    {"role": "assistant", "content": None},
    {
        "role": "user",
        "content": [{"type": "refusal", "refusal": "no"}, {"type": "thinking", "thinking": "hm"}],
    },
    {"role": "assistant"},
    {"role": "user", "content": []},
    {"role": "user", "content": [{"type": "text", "text": None}, "z"]},
]
AS_STRING = "[system]one|[user]a\nb\nc\nd|[assistant]|[user]no\nhm|[assistant]|[user]|[user]z|"
AS_PARTS = "[system]one;|[user]a;b;c;d;|[assistant]|[user]no;hm;|[assistant]|[user]|[user]z;|"


@pytest.mark.parametrize(
    ("template", "form", "text"),
    [
        (STRING, "auto", AS_STRING),
        (STRING, "string", AS_STRING),
        (OPENAI, "auto", AS_PARTS),
        (OPENAI, "openai", AS_PARTS),
        (BOTH, "auto", AS_PARTS),
        (BOTH, "openai", AS_PARTS),
        (BOTH, "string", AS_STRING),
        (MACRO, "auto", AS_PARTS),
        (MACRO, "openai", AS_PARTS),
    ],
)
def test_nothing_of_a_message_vanishes(template, form, text):
    before = copy.deepcopy(EVERY)
    assert chat_prompt(EVERY, template, chat_template_content_format=form) == text
    assert before == EVERY


@pytest.mark.parametrize("template", [OPENAI, BOTH, MACRO])
def test_parts_reach_a_template_as_transformers_gives_them(template):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("x", "y z", "")]}
    ] * 2
    expected = tiny_tokenizer().apply_chat_template(
        messages, chat_template=template, tokenize=False
    )
    assert chat_prompt(messages, template) == expected


def test_parts_keep_their_other_keys():
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{{ p.cache }}{% endfor %}{% endfor %}"
    parts = [{"type": "input_text", "text": "a", "cache": 5}]
    assert chat_prompt([{"role": "user", "content": parts}], template) == "a5"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # The system's content is read as a str, and the others' as parts.
        (
            "{{ messages[0].content + '!' }}" + OPENAI.replace("in messages", "in messages[1:]"),
            "be![user]x;|[tool]x;|",
        ),
        (
            "{{ messages[0].content }}" + OPENAI.replace("in messages", "in messages[1:]"),
            "be[user]x;|[tool]x;|",
        ),
        # A loop that no reading of the template finds.
        (
            "{% for m in messages %}{{ m.content | map(attribute='text') | join(',') }}|{% endfor %}",
            "be|x|x|",
        ),
        ("{% for m in messages %}{{ m.content[0]['text'] }}|{% endfor %}", "be|x|x|"),
        # Tool results are str for most templates.
        (BOTH, "[system]be;|[user]x;|[tool]x|"),
        (OPENAI, "[system]be;|[user]x;|[tool]x;|"),
    ],
)
def test_auto_finds_the_form_that_shows_each_role(template, text):
    messages = [
        {"role": role, "content": t} for role, t in (("system", "be"), ("user", "x"), ("tool", "x"))
    ]
    assert chat_prompt(messages, template) == text


def test_a_format_that_the_template_does_not_read_is_warned_of(caplog):
    chat_prompt([{"role": "user", "content": "x"}], OPENAI, chat_template_content_format="string")
    assert "may show nothing of a message" in caplog.text


def test_developers_and_reasoning_reach_templates_that_know_other_names():
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "u"},
        {"role": "developer", "content": "d"},
    ]
    assert chat_prompt(messages, STRING) == "[system]a\n\nd|[user]u|"
    knows = "{% for m in messages %}{% if m.role == 'developer' %}{{ m.content }}{% endif %}{% endfor %}"
    assert chat_prompt(messages, knows) == "d"
    for name in ("reasoning", "reasoning_content"):
        message = {"role": "assistant", "content": "a", name: "why"}
        both = "{{ messages[0].reasoning }}/{{ messages[0].reasoning_content }}"
        assert chat_prompt([message], both) == "why/why"


@pytest.mark.parametrize(
    ("messages", "error", "text"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            ValueError,
            "image_url",
        ),
        ([{"role": "user", "content": ["a", {"type": "input_audio"}]}], ValueError, "input_audio"),
        ([{"role": "user", "content": [{"text": "a"}]}], ValueError, "only parts of type 'text'"),
        ([{"role": "user", "content": [7]}], ValueError, "only parts of type 'text'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 7}]}],
            TypeError,
            "'text' of a part must be a str",
        ),
        (
            [{"role": "user", "content": 7}],
            TypeError,
            "content must be a str, a list of parts or None; got int",
        ),
        ([{"role": "user", "content": {"type": "text"}}], TypeError, "content must be a str"),
        ([{"role": "user", "content": b"a"}], TypeError, "content must be a str"),
        ([{"content": "a"}], ValueError, "a message needs a 'role'"),
        ({"role": "user", "content": "a"}, TypeError, "messages must be a list"),
        ("hello", TypeError, "messages must be a list"),
        (None, TypeError, "messages must be a list"),
        (["hello"], TypeError, "a conversation must be a list of messages; got str"),
        ([[]], ValueError, "at least one message"),
    ],
)
@pytest.mark.parametrize("form", ["auto", "string", "openai"])
def test_messages_that_are_none(messages, error, text, form):
    with pytest.raises(error, match=text):
        chat_prompt(messages, STRING, chat_template_content_format=form)


def test_templates_by_name_and_by_path(tmp_path):
    (tmp_path / "t.jinja").write_text(STRING + "é", encoding="utf-8")
    messages = ({"role": "user", "content": "x"} for _ in range(1))
    assert chat_prompt(messages, tmp_path / "t.jinja") == "[user]x|é"
    with pytest.raises(
        ValueError, match=r"chat_template='nowhere.jinja' is neither a template nor a file"
    ):
        chat_prompt([{"role": "user", "content": "x"}], "nowhere.jinja")
    llm = make_llm()
    llm.get_tokenizer().chat_template = {
        "default": STRING,
        "tool_use": "{{ tools | length }}" + STRING,
    }
    chat = [{"role": "user", "content": "x"}]
    assert [llm.chat(chat, ONE, use_tqdm=False, tools=t)[0].prompt for t in (None, [{}])] == [
        "[user]x|",
        "1[user]x|",
    ]
    assert (
        llm.chat(chat, ONE, use_tqdm=False, chat_template="tool_use", tools=[])[0].prompt
        == "0[user]x|"
    )


# -- F13: how text becomes tokens ------------------------------------------------------------------


def tokens_of(prompts: Any, params: Any = ONE, **kwargs: Any) -> list[list[int]]:
    return [
        out.prompt_token_ids
        for out in shared_llm().generate(prompts, params, use_tqdm=False, **kwargs)
    ]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"add_special_tokens": False}, [97, 98, 99, 100]),
        ({"truncate_prompt_tokens": 3}, [98, 99, 100]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [BOS, 97, 98]),
        ({"truncate_prompt_tokens": 50}, [BOS, 97, 98, 99, 100]),
        ({"truncate_prompt_tokens": -1, "add_special_tokens": True}, [BOS, 97, 98, 99, 100]),
        ({"truncation": True, "max_length": 2}, [99, 100]),
        (
            {"truncation": False, "padding": "do_not_pad", "add_special_tokens": None},
            [BOS, 97, 98, 99, 100],
        ),
    ],
)
def test_tokenization_kwargs(kwargs, expected):
    assert tokens_of("abcd", tokenization_kwargs=kwargs) == [expected]
    assert tokens_of(["abcd", {"prompt": "abcd"}], tokenization_kwargs=kwargs) == [expected] * 2


def test_tokenization_kwargs_of_chat_and_of_token_ids():
    messages = [{"role": "user", "content": "ab"}]
    (out,) = shared_llm().chat(
        messages, ONE, use_tqdm=False, tokenization_kwargs={"add_special_tokens": True}
    )
    assert out.prompt_token_ids[:2] == [BOS, BOS]
    (out,) = shared_llm().chat(
        messages, ONE, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": 4}
    )
    assert (out.prompt, len(out.prompt_token_ids)) == ("<s>[user] ab</s>[assistant] ", 4)
    assert tokens_of([[1, 2, 3]], tokenization_kwargs={"truncate_prompt_tokens": 2}) == [[2, 3]]
    assert tokens_of("ABC", tokenization_kwargs={"do_lower_case": True}) == [[BOS, 97, 98, 99]]


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        (
            {"return_tensors": "pt"},
            ValueError,
            "tokenization_kwargs: return_tensors is not supported",
        ),
        ({"padding": "max_length"}, ValueError, "padding must be"),
        ({"truncation": "only_first"}, ValueError, "truncation must be"),
        ({"max_length": 5}, ValueError, "max_length must be None without truncation"),
        ({"truncate_prompt_tokens": 0}, ValueError, "truncate_prompt_tokens must be"),
        ({"truncate_prompt_tokens": 513}, ValueError, "at most max_model_len=512"),
        ({"truncate_prompt_tokens": 1.5}, TypeError, "truncate_prompt_tokens must be an integer"),
        ({"truncation_side": "middle"}, ValueError, "truncation_side must be"),
        ({"add_special_tokens": 1}, TypeError, "add_special_tokens must be True or False"),
    ],
)
def test_tokenization_kwargs_are_refused(kwargs, error, text):
    with pytest.raises(error, match=text):
        tokens_of("abcd", tokenization_kwargs=kwargs)


def test_prompts_are_cut_to_their_last_tokens():
    (long,) = random_prompts([600], seed=71)
    assert tokens_of([long, [1, 2]], SamplingParams(max_tokens=1, truncate_prompt_tokens=5)) == [
        long[-5:],
        [1, 2],
    ]
    assert tokens_of([long], SamplingParams(max_tokens=1, truncate_prompt_tokens=-1)) == [
        long[-511:]
    ]
    assert tokens_of("abcd", SamplingParams(max_tokens=1, truncate_prompt_tokens=2)) == [[99, 100]]
    with pytest.raises(ValueError, match="600 tokens"):
        tokens_of([long])
    with pytest.raises(
        ValueError, match="truncate_prompt_tokens must be at most max_model_len=512"
    ):
        tokens_of([long], SamplingParams(truncate_prompt_tokens=513))


# -- F14: prompts that are arrays, or no prompts ---------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([np.array([65, 66]), np.array([67])], [[65, 66], [67]]),
        ([torch.tensor([65, 66]), torch.tensor([67])], [[65, 66], [67]]),
        (
            (torch.tensor([65, 66], dtype=torch.int32), [67], np.array([68], np.uint8)),
            [[65, 66], [67], [68]],
        ),
        (np.array([[65, 66], [67, 68]]), [[65, 66], [67, 68]]),
        (torch.tensor([[65, 66], [67, 68]]), [[65, 66], [67, 68]]),
        (np.array([65, 66]), [[65, 66]]),
        (torch.tensor([65, 66]), [[65, 66]]),
        ([np.int64(65), np.int64(66)], [[65, 66]]),
        ([torch.tensor(65), torch.tensor(66)], [[65, 66]]),
        (np.array([np.array([65, 66]), np.array([67])], dtype=object), [[65, 66], [67]]),
        (np.array(["A", "B"]), [[BOS, 65], [BOS, 66]]),
        ((text for text in "AB"), [[BOS, 65], [BOS, 66]]),
        (range(65, 68), [[65, 66, 67]]),
        ([range(65, 67), (67,)], [[65, 66], [67]]),
        ({"prompt_token_ids": torch.tensor([65, 66])}, [[65, 66]]),
        ([{"prompt_token_ids": np.array([65])}, "A"], [[65], [BOS, 65]]),
        (np.zeros((0, 4), int), []),
        (np.array([], int), []),
    ],
)
def test_arrays_are_prompts(prompts, expected):
    assert tokens_of(prompts) == expected


def test_arrays_as_the_former_keyword_and_in_beam_search():
    arrays = [np.array([65, 66]), torch.tensor([67])]
    assert tokens_of(None, prompt_token_ids=arrays) == [[65, 66], [67]]
    outs = shared_llm().beam_search(arrays, BeamSearchParams(2, 1, ignore_eos=True))
    assert [out.sequences[0].tokens[:-1] for out in outs] == [[65, 66], [67]]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (np.array([1.0, 2.0]), "flat list of int, .*float64"),
        (torch.tensor([1.0, 2.0]), r"flat list of int, .*torch\.float32"),
        (
            torch.tensor([1.0], dtype=torch.bfloat16, requires_grad=True),
            "flat list of int, .*bfloat16",
        ),
        (np.array([True]), "flat list of int, .*bool"),
        (np.zeros((1, 2), int), "flat list of int"),
        (b"bytes", "flat list of int, .*bytes"),
        (bytearray(b"bytes"), "flat list of int, .*bytearray"),
        ({65, 66}, "flat list of int, .*set"),
        ((i for i in (65, 66)), "flat list of int, .*generator"),
        (None, "got NoneType"),
        (65.5, "flat list of int, .*float"),
        ([65, "a"], "flat list of int, .*list"),
        (object(), "flat list of int, .*object"),
    ],
)
def test_what_is_no_prompt_is_one_sentence_and_good_prompts_go_on(bad, text):
    llm = shared_llm()
    stream = llm.stream([[65, 66]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    for prompts in ([bad], ["A", bad, [65]]):
        with pytest.raises(TypeError, match=text):
            llm.generate(prompts, ONE, use_tqdm=False)
    assert len(list(stream)) == 3
    assert_idle(llm)


@pytest.mark.parametrize(
    "bad", [b"bytes", bytearray(b"b"), {"A", "B"}, frozenset([65]), 5, 5.5, object()]
)
def test_what_is_no_list_of_prompts(bad):
    with pytest.raises(TypeError, match="prompts must be a str, a list of token ids"):
        shared_llm().generate(bad, ONE)


def test_media_that_are_arrays_are_refused_by_a_sentence():
    with pytest.raises(ValueError, match=r"multi_modal_data.* not supported"):
        shared_llm().generate({"prompt": "A", "multi_modal_data": np.zeros(4)}, ONE)


# -- text that is not valid Unicode ----------------------------------------------------------------

LONE = ["\ud800", "a\udfffb", "the \ud83d", json.loads('"\\udc80"')]


@pytest.mark.parametrize("text", LONE)
def test_a_lone_surrogate_is_one_sentence(text):
    llm = shared_llm()
    stream = llm.stream([[65, 66]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    for prompts in (text, [text], ["good", text], [{"prompt": text}, [65]]):
        with pytest.raises(
            ValueError,
            match=r"prompt: the text is not valid Unicode, because character \d+ is '\\ud",
        ):
            llm.generate(prompts, ONE, use_tqdm=False)
    with pytest.raises(ValueError, match="not valid Unicode"):
        llm.beam_search(["good", text], BeamSearchParams(2, 2))
    for messages in ([{"role": "user", "content": text}], [{"role": "user", "content": [text]}]):
        with pytest.raises(ValueError, match="messages: the text is not valid Unicode"):
            llm.chat(messages, ONE)
    with pytest.raises(ValueError, match="messages: the text is not valid Unicode"):
        chat_prompt([tool_message(json.dumps({"a": text}))], ARGUMENTS)
    for name in ("stop", "bad_words"):
        with pytest.raises(ValueError, match=f"{name}: the text is not valid Unicode"):
            SamplingParams(**{name: ["good", text]})
        changed = SamplingParams()
        setattr(changed, name, [text])
        with pytest.raises(ValueError, match=f"{name}: the text is not valid Unicode"):
            llm.generate(["good"], changed, use_tqdm=False)
    assert len(list(stream)) == 3
    assert_idle(llm)


def test_characters_beyond_the_first_plane_are_valid():
    assert tokens_of("😀") == [tiny_tokenizer().encode("😀")]


# -- F15: text of byte-fallback tokens -------------------------------------------------------------


@cache
def byte_fallback_tokenizer() -> Any:
    """As Llama 2's: ids 0 to 255 are <0x00> to <0xFF>; a space begins a word, and the first is
    stripped.
    """
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁The", "▁fox", "a", "▁"]
    vocab = {name: i for i, name in enumerate([*names, *words])}
    tokenizer = Tokenizer(
        models.BPE({**vocab, "<s>": 298, "</s>": 299}, [], byte_fallback=True, unk_token="<s>")
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def outputs(
    script: list[int], max_tokens: int, kind: RequestOutputKind, **params: Any
) -> list[Any]:
    """A stream's outputs after the token script[0], which ids of `script` follow for ever."""
    llm = byte_llm(tuple(script))
    chosen = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, output_kind=kind, **params
    )
    return [out.outputs[0] for out in llm.stream([[256, script[0]]], chosen)]


@cache
def byte_llm(script: tuple[int, ...]) -> Any:
    llm = make_llm(scripted_model(script))
    llm.set_tokenizer(byte_fallback_tokenizer())
    return llm


CYCLES = {
    "東": [257, *"東".encode(), *"東".encode()[:1]],
    "😀": [257, *"😀".encode(), *"😀".encode()[:1]],
    "é": [257, *"é".encode(), *"é".encode()[:1]],
}


@pytest.mark.parametrize("character", ["東", "😀", "é"])
def test_a_byte_run_streams_character_by_character(character):
    size = len(character.encode())
    deltas = [out.text for out in outputs(CYCLES[character], 5 * size, RequestOutputKind.DELTA)]
    assert deltas == [*[""] * (size - 1), character] * 5
    cumulative = [
        out.text for out in outputs(CYCLES[character], 5 * size, RequestOutputKind.CUMULATIVE)
    ]
    assert cumulative == [character * (n // size) for n in range(1, 5 * size + 1)]


@pytest.mark.parametrize(
    ("script", "max_tokens", "text"),
    [
        (CYCLES["東"], 8, "東東\ufffd\ufffd"),  # cut inside a character
        ([257, 0xFF, *"東".encode(), 258], 5, "\ufffd東a"),
        ([257, *"東".encode(), 0xC3, 258], 5, "東\ufffda"),
        ([257, 0xE6, 0x9D, 258, 257], 4, "\ufffd\ufffda fox"),
        ([257, 0xC3, 0xE6, 0x9D, 0xB1, 256], 5, "\ufffd東 The"),
        ([257, 0x20, 0x41, 256], 3, " A The"),
    ],
)
def test_streamed_and_final_text_are_equal_and_nothing_is_taken_back(script, max_tokens, text):
    for params in ({}, {"logprobs": 2}, {"stop": ["never"]}):
        deltas = outputs(script, max_tokens, RequestOutputKind.DELTA, **params)
        assert "".join(out.text for out in deltas) == text
        shown = [
            out.text for out in outputs(script, max_tokens, RequestOutputKind.CUMULATIVE, **params)
        ]
        assert shown[-1] == text
        assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
        assert outputs(script, max_tokens, RequestOutputKind.FINAL_ONLY, **params)[-1].text == text


def test_a_stop_string_ends_a_byte_run():
    (out,) = outputs(CYCLES["東"], 20, RequestOutputKind.FINAL_ONLY, stop=["東東"])
    assert (out.text, len(out.token_ids), out.stop_reason) == ("", 6, "東東")


# -- the pieces of a text join to the text ---------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "max_tokens", "pieces"),
    [
        (CYCLES["東"], 7, ["", "", "東", "", "", "東", "\ufffd"]),
        (CYCLES["😀"], 4, ["", "", "", "😀"]),
        ([257, 0xE6, 0x9D, 258, 256], 4, ["", "", "\ufffd\ufffda", " The"]),
        ([257, 0xFF, 258], 2, ["", "\ufffda"]),
    ],
)
@pytest.mark.parametrize("kind", RequestOutputKind)
def test_decoded_tokens_join_to_the_text(script, max_tokens, pieces, kind):
    found = outputs(script, max_tokens, kind, logprobs=0)
    chosen = found if kind is RequestOutputKind.DELTA else found[-1:]
    entries = [entry for out in chosen for entry in out.logprobs]
    assert [logprob.decoded_token for entry in entries for logprob in entry.values()] == pieces
    assert "".join(pieces) == "".join(out.text for out in chosen)


def test_decoded_tokens_of_a_random_model_join_to_its_text():
    params = SamplingParams(
        max_tokens=60, seed=5, temperature=2, logprobs=3, n=3, bad_words=["<s>"], stop_token_ids=[7]
    )
    for out in shared_llm().generate(random_prompts([2, 9], seed=72), params, use_tqdm=False):
        for completion in out.outputs:
            entries = zip(completion.token_ids, completion.logprobs)
            hidden = {299: "</s>", 298: "<s>", 7: "\x07" * (completion.stop_reason == 7)}
            pieces = [
                entry[i].decoded_token.removesuffix(hidden.get(i, "")) for i, entry in entries
            ]
            assert "".join(pieces) == completion.text


def test_decoded_tokens_of_a_prompt_join_to_its_text():
    prompt = [65, *"東😀".encode(), 66, *"é".encode()]
    for tokens_a_step in (256, 3):
        llm = shared_llm(max_num_batched_tokens=tokens_a_step, max_num_seqs=2)
        (out,) = llm.generate(
            [prompt], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
        )
        pieces = [entry[i].decoded_token for i, entry in zip(prompt[1:], out.prompt_logprobs[1:])]
        assert "".join(pieces) == "東😀Bé"
        assert pieces == ["", "", "東", "", "", "", "😀", "B", "", "é"]
