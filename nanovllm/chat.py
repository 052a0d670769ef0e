"""Conversations to prompts, by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovllm.errors import ValidationError


def render(
    tokenizer: Any,
    conversations: Sequence[Any],
    *,
    chat_template: str | None,
    chat_template_content_format: str,
    **options: Any,
) -> list[dict[str, Any]]:
    """A prompt for each conversation. `chat_template` is a template or the path of one; None is the tokenizer's own.

    `options` are apply_chat_template's and the template's own. Raises ValueError where there is no template, or it fails.
    """
    if chat_template_content_format not in ("auto", "string"):
        raise ValidationError(
            f"chat_template_content_format={chat_template_content_format!r} is not supported; accepted: 'auto', 'string'"
        )
    if chat_template and "{" not in chat_template and Path(chat_template).is_file():
        chat_template = Path(chat_template).read_text()
    if chat_template is None and tokenizer.chat_template is None:
        raise ValidationError("chat: this model's tokenizer has no chat template; pass chat_template=")
    prompts = []
    for conversation in conversations:
        messages = [as_text(message) for message in conversation]
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **options)
        except Exception as err:  # a template raises what it likes
            raise ValidationError(f"messages: the chat template cannot render them: {err}") from err
        # The template has written BOS and its kin already.
        prompts.append({"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)})
    return prompts


def as_text(message: Any) -> Any:
    """A chat message whose content is a list of parts, as OpenAI's clients write it, with their text in one piece."""
    if not isinstance(message, Mapping):
        raise TypeError(f"a message must be a dict with 'role' and 'content', got {type(message).__name__}")
    parts = message.get("content")
    if not isinstance(parts, (list, tuple)):
        return message
    if other := [part for part in parts if not isinstance(part, Mapping) or part.get("type") != "text"]:
        raise ValidationError(f"content: only parts of type 'text' are supported, got {str(other[0])[:80]}")
    return {**message, "content": "\n".join(part["text"] for part in parts)}
