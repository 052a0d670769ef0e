"""The two dict forms of a prompt; text and lists of token ids need no record."""

from __future__ import annotations

from typing import TypedDict


class TextPrompt(TypedDict):
    """Text, which the engine tokenises."""

    prompt: str


class _Echoed(TypedDict, total=False):
    prompt: str


class TokensPrompt(_Echoed):
    """Token ids; `prompt`, if given, is only echoed in the output."""

    prompt_token_ids: list[int]
