"""Chat messages as clients write them, brought to one form. Nothing here knows a template or a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from nanovllm.errors import ValidationError

# In one form `content` is a list of {"type": "text", "text": str}, and all other keys are as the caller gave them.
Message = dict[str, Any]

# The types of parts that are text, and the key that holds the text.
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


def as_conversations(messages: Any) -> list[Any]:
    """One conversation or a list of them as a list of conversations."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(f"messages must be a list of messages or a list of such lists; got {type(messages).__name__}")
    items = list(messages)
    return [items] if items and isinstance(items[0], Mapping) else items


def as_messages(conversation: Any) -> list[Message]:
    """The messages of one conversation in one form. Raises TypeError or ValueError for what is none."""
    if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Iterable):
        raise TypeError(f"messages: a conversation must be a list of messages; got {type(conversation).__name__}")
    messages = [as_message(message) for message in conversation]
    if not messages:
        raise ValidationError("messages: a conversation needs at least one message; got an empty list")
    return messages


def as_message(given: Any) -> Message:
    if not isinstance(given, Mapping):
        raise TypeError(f"a message must be a dict with 'role' and 'content', got {type(given).__name__}")
    if not isinstance(given.get("role"), str):
        raise ValidationError(f"a message needs a 'role', which is a str; got the keys {list(given)}")
    message = {**given, "content": text_parts(given.get("content"))}
    if message["role"] == "assistant":
        add_reasoning(message)
        add_tool_calls(message)
    return message


def text_parts(content: Any) -> list[dict[str, Any]]:
    """A content of any form as a list of text parts. None is no part, and so is a part whose text is None."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Iterable):
        raise TypeError(f"content must be a str, a list of parts or None; got {type(content).__name__}")
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        if not isinstance(part, Mapping) or part.get("type") not in TEXT_PARTS:
            accepted = ", ".join(TEXT_PARTS)
            raise ValidationError(
                f"content: only parts of type 'text' and its like ({accepted}) are supported, got {str(part)[:80]}"
            )
        key = TEXT_PARTS[part["type"]]
        text = part.get(key)
        if text is None:
            continue
        if not isinstance(text, str):
            raise TypeError(f"content: {key!r} of a part must be a str; got {type(text).__name__}")
        others = {name: value for name, value in part.items() if name not in ("type", key)}
        parts.append({"type": "text", "text": text, **others})
    return parts


def add_reasoning(message: Message) -> None:
    """Gives an assistant's reasoning under both names that templates know."""
    names = ("reasoning", "reasoning_content")
    found = [message[name] for name in names if message.get(name) is not None]
    if found:
        for name in names:
            message.setdefault(name, found[0])


def add_tool_calls(message: Message) -> None:
    """Gives the arguments of an assistant's tool calls as dicts, which templates expect. No calls are no key."""
    calls = message.pop("tool_calls", None)
    if calls is None:
        return
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Iterable):
        raise TypeError(f"tool_calls must be a list of dicts; got {type(calls).__name__}")
    parsed = [tool_call(call) for call in calls]
    if parsed:
        message["tool_calls"] = parsed


def tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise ValidationError(
            f"tool_calls: each must be a dict of type 'function' with a dict 'function'; got {str(call)[:80]}"
        )
    return {**call, "function": {**function, "arguments": tool_arguments(function.get("arguments"))}}


def tool_arguments(arguments: Any) -> dict[str, Any]:
    """A call's arguments, which clients write as JSON text. None and "" are no arguments."""
    parsed = arguments
    if isinstance(arguments, str) and arguments.strip():
        try:
            parsed = json.loads(arguments)
        except ValueError as err:
            raise ValidationError(
                f"tool_calls: arguments={arguments[:80]!r} is no JSON: {err}", parameter="tool_calls", value=arguments
            ) from err
    if parsed is None or (isinstance(parsed, str) and not parsed.strip()):
        return {}
    if not isinstance(parsed, Mapping):
        raise ValidationError(
            f"tool_calls: arguments must be a dict or JSON text of one; got {str(arguments)[:80]!r}",
            parameter="tool_calls",
            value=arguments,
        )
    return dict(parsed)


def with_content(messages: list[Message], forms: list[str]) -> list[Message]:
    """The messages with their contents as str ("string") or as they are, lists of parts ("openai")."""
    found = []
    for message, form in zip(messages, forms):
        content = message["content"]
        if form == "string":
            content = "\n".join(part["text"] for part in content)
        found.append({**message, "content": content})
    return found


def developers_as_system(messages: list[Message]) -> list[Message]:
    """For a template without the role "developer": such messages become the system's, all of them one at the front."""
    if all(message["role"] != "developer" for message in messages):
        return messages
    system = [message for message in messages if message["role"] in ("system", "developer")]
    others = [message for message in messages if message["role"] not in ("system", "developer")]
    text = "\n\n".join(part["text"] for message in system for part in message["content"])
    return [{"role": "system", "content": [{"type": "text", "text": text}]}, *others]
