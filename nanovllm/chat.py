"""Conversations -> prompts, by a chat template. Never changes the caller's messages.

A template reads the content of a message in one of two formats: a str ("string"), or a
list of parts ("openai"). With the wrong format most templates show nothing of the
message, or Python's notation of the list.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.errors import ValidationError
from nanovllm.inputs import check_unicode
from nanovllm.messages import Message, as_messages, developers_as_system, with_content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMATS = ("auto", "string", "openai")
# Arguments of apply_chat_template that only `render` sets.
RESERVED = ("chat_template", "tokenize", "conversation", "conversations", "messages")


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[object],
    *,
    chat_template: str | os.PathLike[str] | None,
    content_format: str,
    arguments: Mapping[str, object],
    chat_template_kwargs: Mapping[str, object] | None,
) -> list[str]:
    """The text of each conversation.

    chat_template: a template, the path of a template, or the name of one of the
    tokenizer's templates. None is the tokenizer's default.
    arguments: for apply_chat_template. `chat_template_kwargs` replace equal names.
    Raises ValueError or TypeError for a missing or failing template or a bad message.
    """
    from nanovllm.chat_format import iterates_content  # imports jinja2, which only chat needs

    options = {**arguments, **checked_kwargs(content_format, chat_template_kwargs)}
    template = find_template(tokenizer, chat_template, options.get("tools"))
    detected = "openai" if iterates_content(template) else "string"
    is_auto = content_format == "auto"
    preferred = detected if is_auto else content_format
    if preferred != detected:
        logger.warning(
            "chat_template_content_format=%r, but the template seems to read %r: "
            "the prompt may show nothing of a message.",
            content_format,
            detected,
        )

    def apply(messages: list[Message]) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, **options
            )
        except Exception as err:  # because a template can raise any exception
            raise ValidationError(f"messages: the chat template cannot render them: {err}") from err

    texts = []
    for conversation in conversations:
        messages = as_messages(conversation)
        if "'developer'" not in template and '"developer"' not in template:
            messages = developers_as_system(messages)
        formats = choose_formats(apply, messages, preferred, is_auto)
        text = apply(with_content(messages, formats))
        check_unicode("messages", text)
        texts.append(text)
    return texts


def checked_kwargs(
    content_format: str, chat_template_kwargs: Mapping[str, object] | None
) -> Mapping[str, object]:
    """The variables for the template. Raises ValidationError for a bad format or name."""
    if content_format not in FORMATS:
        accepted = ", ".join(map(repr, FORMATS))
        raise ValidationError(
            f"chat_template_content_format={content_format!r} is not supported; "
            f"accepted: {accepted}"
        )
    given = chat_template_kwargs or {}
    reserved = [name for name in RESERVED if name in given]
    if reserved:
        raise ValidationError(
            f"chat_template_kwargs may not hold {', '.join(reserved)}, because chat sets them "
            "from its own arguments"
        )
    return given


def find_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | os.PathLike[str] | None,
    tools: object,
) -> str:
    """The text of the template. Raises ValidationError if there is none.

    tools: the conversation's tools. Some tokenizers have a separate template for tools.
    """
    if chat_template is None and tokenizer.chat_template is None:
        raise ValidationError(
            "chat: this model's tokenizer has no chat template; pass chat_template="
        )
    if isinstance(chat_template, os.PathLike) or (chat_template and "{" not in chat_template):
        if Path(chat_template).is_file():
            return Path(chat_template).read_text(encoding="utf-8")
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        if chat_template not in named and "\n" not in str(chat_template):
            raise ValidationError(
                f"chat_template={str(chat_template)!r} is neither a template nor a file"
            )
    try:
        return str(tokenizer.get_chat_template(chat_template, tools))
    except ValueError as err:  # several templates, and none of them is the default
        raise ValidationError(f"chat_template: {err}") from err


def choose_formats(
    apply: Callable[[list[Message]], str], messages: list[Message], preferred: str, is_auto: bool
) -> list[str]:
    """The content format of each message with which the template shows the most messages.

    preferred: "string" or "openai". Tool messages begin with "string", because most
    templates expect a str there. If the template fails, or hides messages of a role, the
    other format is tried. Without `is_auto` only tool messages may get the other format.
    """
    roles = [message["role"] for message in messages]
    default = ["string" if role == "tool" else preferred for role in roles]
    if not is_auto and "tool" not in roles:
        return default
    formats = default
    hidden = hidden_messages(apply, messages, formats)
    if hidden is None and is_auto:
        formats = [other_format(preferred)] * len(messages)
        hidden = hidden_messages(apply, messages, formats)
    if hidden is None:
        return default
    for role in dict.fromkeys(roles[i] for i in hidden):
        if not is_auto and (role != "tool" or preferred == "string"):
            continue
        changed = list(formats)
        for i in hidden:
            if roles[i] == role:
                changed[i] = other_format(changed[i])
        still_hidden = hidden_messages(apply, messages, changed)
        if still_hidden is not None and len(still_hidden) < len(hidden):
            formats = changed
            hidden = still_hidden
    return formats


def hidden_messages(
    apply: Callable[[list[Message]], str], messages: list[Message], formats: list[str]
) -> list[int] | None:
    """The indices of messages with text that the template leaves out. None if it fails.

    Every text gets a marker at its end, because equal texts must differ. Python's
    notation of a list escapes the marker's characters, so that notation counts as hidden.
    """
    marked = []
    for i, message in enumerate(messages):
        parts = []
        for j, part in enumerate(message["content"]):
            parts.append({**part, "text": part["text"] + marker(i, j)})
        marked.append({**message, "content": parts})
    try:
        text = apply(with_content(marked, formats))
    except ValidationError:
        return None
    hidden = []
    for i, message in enumerate(messages):
        markers = [marker(i, j) for j in range(len(message["content"]))]
        if any(each not in text for each in markers):
            hidden.append(i)
    return hidden


def marker(message: int, part: int) -> str:
    """A text of private-use characters, which templates and messages should not have."""
    return f"\ue000{message}.{part}\ue001"


def other_format(content_format: str) -> str:
    return "string" if content_format == "openai" else "openai"
