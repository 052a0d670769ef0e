"""The body of an OpenAI request -> prompts and fields of SamplingParams. Knows no answers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from nanovllm.batch.work import Chat, JsonObject
from nanovllm.errors import ValidationError

# Fields of both kinds of requests that SamplingParams has by the same name.
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "best_of",
    "stop",
    "seed",
    "max_tokens",
    "min_tokens",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "use_beam_search",
    "length_penalty",
    "structured_outputs",
)
OTHERS = ("model", "logprobs", "add_special_tokens", "cache_salt", "vllm_xargs")
# Fields that go to the chat template: OpenAI's and vLLM's name -> the template's variable.
TEMPLATE = {
    "add_generation_prompt": "add_generation_prompt",
    "continue_final_message": "continue_final_message",
    "tools": "tools",
    "documents": "documents",
    "reasoning_effort": "reasoning_effort",
}
CHAT = (
    "messages",
    "chat_template",
    "chat_template_kwargs",
    "max_completion_tokens",
    "top_logprobs",
    *TEMPLATE,
)
# Fields that change no answer.
NO_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "request_id",
    "stream_options",
)
# Fields for abilities that a batch lacks -> the values that use no such ability. None is
# neutral for all.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "priority": (0,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
}


def check_fields(body: JsonObject, own: Sequence[str]) -> None:
    """Raises ValueError for a field that is unknown, or that would change the answer.

    own: the fields of this kind of request.
    """
    known = {*SAMPLING, *OTHERS, *own, *NO_EFFECT, *NEUTRAL}
    for name, value in body.items():
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValidationError(f"body: {name}={value!r} is not a known field{hint}")
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            accepted = ", ".join(map(repr, (None, *NEUTRAL[name])))
            raise ValidationError(f"body: {name}={value!r} is not supported; accepted: {accepted}")


def chat_prompts(body: JsonObject) -> list[object]:
    if body.get("messages") is None:
        raise ValidationError("body: a chat completion needs 'messages'")
    given = {name: body[key] for key, name in TEMPLATE.items() if body.get(key) is not None}
    kwargs = body.get("chat_template_kwargs")
    return [Chat(body["messages"], body.get("chat_template"), given, kwargs)]


def completion_prompts(body: JsonObject) -> list[object]:
    """One prompt, or a list of prompts. A prompt is text or a list of token ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ValidationError(
            f"body: prompt={prompt!r} must be text, token ids, or a list of texts or of token ids"
        )
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def chat_fields(body: JsonObject, defaults: Mapping[str, object]) -> JsonObject:
    """Fields of SamplingParams. Without a limit the answer may fill the context."""
    given = sampling_fields(body)
    limit = body.get("max_completion_tokens")
    if limit is not None:
        given["max_tokens"] = limit
    wants_logprobs = body.get("logprobs")
    if not isinstance(wants_logprobs, (bool, type(None))):
        raise TypeError(f"body: logprobs={wants_logprobs!r} must be true or false")
    top = body.get("top_logprobs") or 0
    if wants_logprobs:
        given["logprobs"] = top
    elif top:
        raise ValidationError(f"body: top_logprobs={top} needs logprobs=true")
    return {"max_tokens": None, **defaults, **given}


def completion_fields(body: JsonObject, defaults: Mapping[str, object]) -> JsonObject:
    given = sampling_fields(body)
    if body.get("logprobs") is not None:
        given["logprobs"] = body["logprobs"]
    return {**defaults, **given}


def sampling_fields(body: JsonObject) -> JsonObject:
    given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    if body.get("vllm_xargs") is not None:
        given["extra_args"] = body["vllm_xargs"]
    return given
