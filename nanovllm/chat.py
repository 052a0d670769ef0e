"""Conversations to prompts, by the tokenizer's chat template. Messages of the caller are never changed.

A template reads a message's content as a str (format "string") or as a list of parts (format "openai"). Given the other
form, most templates show nothing of the message, or Python's notation of the list.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovllm.errors import ValidationError
from nanovllm.inputs import check_unicode
from nanovllm.messages import Message, as_messages, developers_as_system, with_content

logger = logging.getLogger(__name__)

FORMATS = ("auto", "string", "openai")
# Arguments of apply_chat_template that chat sets itself.
RESERVED = ("chat_template", "tokenize", "conversation", "conversations", "messages")


def render(
    tokenizer: Any,
    conversations: Sequence[Any],
    *,
    chat_template: str | os.PathLike[str] | None,
    content_format: str,
    arguments: Mapping[str, Any],
    chat_template_kwargs: Mapping[str, Any] | None,
) -> list[str]:
    """The text of each conversation.

    chat_template: a template, the path of one, or the name of one of the tokenizer's; None is the tokenizer's own.
    arguments: of apply_chat_template. `chat_template_kwargs` replace them, and reach the template.
    Raises ValueError where there is no template, where it fails, or for a message that it cannot take.
    """
    from nanovllm.chat_format import iterates_content  # imports jinja2, which only chat needs

    if content_format not in FORMATS:
        accepted = ", ".join(map(repr, FORMATS))
        raise ValidationError(f"chat_template_content_format={content_format!r} is not supported; accepted: {accepted}")
    given = dict(chat_template_kwargs or {})
    if reserved := [name for name in RESERVED if name in given]:
        raise ValidationError(
            f"chat_template_kwargs may not hold {', '.join(reserved)}: chat sets them from its own arguments"
        )
    options = {**arguments, **given}
    template = find_template(tokenizer, chat_template, options.get("tools"))
    detected = "openai" if iterates_content(template) else "string"
    if content_format not in ("auto", detected):
        logger.warning(
            "chat_template_content_format=%r, but the template reads like %r: it may show nothing of a message.",
            content_format,
            detected,
        )

    def apply(messages: list[Message]) -> str:
        try:
            return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
        except Exception as err:  # a template raises what it likes
            raise ValidationError(f"messages: the chat template cannot render them: {err}") from err

    texts = []
    for conversation in conversations:
        messages = as_messages(conversation)
        if "'developer'" not in template and '"developer"' not in template:
            messages = developers_as_system(messages)
        is_auto = content_format == "auto"
        forms = fitting(apply, messages, detected if is_auto else content_format, is_auto)
        text = apply(with_content(messages, forms))
        check_unicode("messages", text)
        texts.append(text)
    return texts


def find_template(tokenizer: Any, chat_template: str | os.PathLike[str] | None, tools: Any) -> str:
    """The text of the template to use."""
    if chat_template is None and tokenizer.chat_template is None:
        raise ValidationError("chat: this model's tokenizer has no chat template; pass chat_template=")
    if isinstance(chat_template, os.PathLike) or (chat_template and "{" not in chat_template):
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        if Path(chat_template).is_file():
            return Path(chat_template).read_text(encoding="utf-8")
        if chat_template not in named and "\n" not in str(chat_template):
            raise ValidationError(f"chat_template={str(chat_template)!r} is neither a template nor a file")
    try:
        return str(tokenizer.get_chat_template(chat_template, tools))
    except ValueError as err:  # the tokenizer has several templates, and none is the default
        raise ValidationError(f"chat_template: {err}") from err


def fitting(render_one: Callable[[list[Message]], str], messages: list[Message], form: str, is_auto: bool) -> list[str]:
    """The form in which the template gets each message's content.

    form: "string" or "openai". Tool messages are str in both, because most templates expect that. Where the template shows
    nothing of the messages of a role, or fails, they get the other form if that shows them: those of all roles with
    `is_auto`, else only the tool's.
    """
    default = ["string" if message["role"] == "tool" else form for message in messages]
    if not is_auto and "tool" not in [message["role"] for message in messages]:
        return default
    forms, hidden = default, hidden_messages(render_one, messages, default)
    if hidden is None and is_auto:
        forms = [other(form)] * len(messages)
        hidden = hidden_messages(render_one, messages, forms)
    if hidden is None:
        return default
    for role in dict.fromkeys(messages[i]["role"] for i in hidden):
        if is_auto or (role == "tool" and form == "openai"):
            is_flipped = [i in hidden and message["role"] == role for i, message in enumerate(messages)]
            flipped = [other(f) if flip else f for f, flip in zip(forms, is_flipped)]
            still_hidden = hidden_messages(render_one, messages, flipped)
            if still_hidden is not None and len(still_hidden) < len(hidden):
                forms, hidden = flipped, still_hidden
    return forms


def hidden_messages(
    render_one: Callable[[list[Message]], str], messages: list[Message], forms: list[str]
) -> list[int] | None:
    """The indices of messages of which the template leaves out some part; None if it fails.

    Every text gets a mark at its end, which also tells equal texts apart. Python's notation of a list escapes the mark.
    """
    marked = []
    for i, message in enumerate(messages):
        parts = [{**part, "text": part["text"] + mark(i, j)} for j, part in enumerate(message["content"])]
        marked.append({**message, "content": parts})
    try:
        text = render_one(with_content(marked, forms))
    except ValidationError:
        return None
    return [
        i for i, message in enumerate(messages) if any(mark(i, j) not in text for j in range(len(message["content"])))
    ]


def mark(message: int, part: int) -> str:
    return f"\ue000{message}.{part}\ue001"


def other(form: str) -> str:
    return "string" if form == "openai" else "openai"
