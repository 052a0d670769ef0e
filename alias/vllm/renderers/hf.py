"""Which chat template a conversation is rendered with."""

from typing import Any

from nanovllm.chat import find_template
from nanovllm.errors import ValidationError


def resolve_chat_template(
    tokenizer: Any, chat_template: str | None = None, tools: Any = None, **_: object
) -> str | None:
    """The text of the given template, or of the tokenizer's own. None if there is none.

    Further arguments of vLLM, such as model_config, have no effect.
    """
    try:
        return find_template(tokenizer, chat_template, tools)
    except ValidationError:
        if chat_template is not None:
            raise
        return None


__all__ = ["resolve_chat_template"]
