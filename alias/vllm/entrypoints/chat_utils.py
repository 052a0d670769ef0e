"""Older addresses of what `vllm.renderers.hf` has."""

from vllm.renderers.hf import resolve_chat_template

ChatCompletionMessageParam = dict[str, object]


def resolve_hf_chat_template(
    tokenizer: object, chat_template: str | None = None, tools: object = None, **_: object
) -> str | None:
    return resolve_chat_template(tokenizer, chat_template, tools)


__all__ = ["ChatCompletionMessageParam", "resolve_hf_chat_template"]
