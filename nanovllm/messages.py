"""Chat messages of clients, normalised to one form. Knows no template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from nanovllm.errors import ValidationError

JsonObject = dict[str, Any]

# A normalised message: `content` is a list of {"type": "text", "text": str}. The other
# keys are the caller's.
Message = JsonObject

# Types of parts that hold text -> the key of the text.
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


def is_list(value: object) -> bool:
    """Whether a value is iterable, and neither text nor a dict."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def as_conversations(messages: Iterable[object]) -> list[object]:
    """One conversation or a list of them -> a list of conversations. Raises TypeError."""
    if not is_list(messages):
        raise TypeError(
            "messages must be a list of messages or a list of such lists; "
            f"got {type(messages).__name__}"
        )
    items = list(messages)
    if items and isinstance(items[0], Mapping):
        return [items]
    return items


def as_messages(conversation: object) -> list[Message]:
    """The normalised messages of one conversation. Raises TypeError or ValueError."""
    if not isinstance(conversation, Iterable) or not is_list(conversation):
        raise TypeError(
            "messages: a conversation must be a list of messages; "
            f"got {type(conversation).__name__}"
        )
    messages = [as_message(message) for message in conversation]
    if not messages:
        raise ValidationError(
            "messages: a conversation needs at least one message; got an empty list"
        )
    return messages


def as_message(given: object) -> Message:
    """One normalised message. Raises TypeError or ValueError."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"a message must be a dict with 'role' and 'content', got {type(given).__name__}"
        )
    if not isinstance(given.get("role"), str):
        raise ValidationError(
            f"a message needs a 'role', which is a str; got the keys {list(given)}"
        )
    message = {**given, "content": text_parts(given.get("content"))}
    if message["role"] == "assistant":
        copy_reasoning(message)
        parse_tool_calls(message)
    return message


def text_parts(content: object) -> list[JsonObject]:
    """The text parts of a content. Drops None, and parts whose text is None."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Iterable) or not is_list(content):
        raise TypeError(
            f"content must be a str, a list of parts or None; got {type(content).__name__}"
        )
    parts = [text_part(part) for part in content]
    return [part for part in parts if part["text"] is not None]


def text_part(part: object) -> JsonObject:
    """One part as {"type": "text", "text": str or None}, with the part's other keys."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping) or part.get("type") not in TEXT_PARTS:
        raise ValidationError(
            f"content: only parts of type 'text' or similar ({', '.join(TEXT_PARTS)}) are "
            f"supported, got {str(part)[:80]}"
        )
    key = TEXT_PARTS[part["type"]]
    text = part.get(key)
    if text is not None and not isinstance(text, str):
        raise TypeError(f"content: {key!r} of a part must be a str; got {type(text).__name__}")
    others = {name: value for name, value in part.items() if name not in ("type", key)}
    return {"type": "text", "text": text, **others}


def copy_reasoning(message: Message) -> None:
    """Stores an assistant's reasoning under both names, because templates read either."""
    names = ("reasoning", "reasoning_content")
    found = [message[name] for name in names if message.get(name) is not None]
    if found:
        for name in names:
            message.setdefault(name, found[0])


def parse_tool_calls(message: Message) -> None:
    """Makes the arguments of tool calls dicts, because templates expect dicts.

    Removes the key of an empty list, because templates test whether the key exists.
    """
    calls = message.pop("tool_calls", None)
    if calls is None:
        return
    if not is_list(calls):
        raise TypeError(f"tool_calls must be a list of dicts; got {type(calls).__name__}")
    parsed = [tool_call(call) for call in calls]
    if parsed:
        message["tool_calls"] = parsed


def tool_call(call: object) -> JsonObject:
    function = call.get("function") if isinstance(call, Mapping) else None
    is_function = isinstance(call, Mapping) and call.get("type", "function") == "function"
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not is_function:
        raise ValidationError(
            "tool_calls: each must be a dict of type 'function' with a dict 'function'; "
            f"got {str(call)[:80]}"
        )
    arguments = tool_arguments(function.get("arguments"))
    return {**call, "function": {**function, "arguments": arguments}}


def tool_arguments(arguments: object) -> JsonObject:
    """The arguments of a call, from JSON text or a dict. {} for None and ""."""
    parsed: object = arguments
    if isinstance(arguments, str) and arguments.strip():
        try:
            parsed = json.loads(arguments)
        except ValueError as err:
            raise ValidationError(
                f"tool_calls: arguments={arguments[:80]!r} is no JSON: {err}",
                parameter="tool_calls",
                value=arguments,
            ) from err
    if parsed is None or (isinstance(parsed, str) and not parsed.strip()):
        return {}
    if not isinstance(parsed, Mapping):
        raise ValidationError(
            "tool_calls: arguments must be a dict or JSON text of one; "
            f"got {str(arguments)[:80]!r}",
            parameter="tool_calls",
            value=arguments,
        )
    return dict(parsed)


def with_content(messages: list[Message], formats: list[str]) -> list[Message]:
    """The messages, each content as a str ("string") or as list of parts ("openai")."""
    found = []
    for message, content_format in zip(messages, formats):
        content = message["content"]
        if content_format == "string":
            content = "\n".join(part["text"] for part in content)
        found.append({**message, "content": content})
    return found


def developers_as_system(messages: list[Message]) -> list[Message]:
    """Merges messages of the role "developer" into the system message, the first one.

    Needed for templates that do not know the role.
    """
    if all(message["role"] != "developer" for message in messages):
        return messages
    texts = []
    others = []
    for message in messages:
        if message["role"] in ("system", "developer"):
            texts += [part["text"] for part in message["content"]]
        else:
            others.append(message)
    content = [{"type": "text", "text": "\n\n".join(texts)}]
    return [{"role": "system", "content": content}, *others]
