"""The dict forms of a prompt, and how text becomes tokens. Nothing here knows a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from nanovllm.errors import ValidationError


class TextPrompt(TypedDict):
    """Text, which the engine tokenises."""

    prompt: str


class _Echoed(TypedDict, total=False):
    prompt: str


class TokensPrompt(_Echoed):
    """Token ids; `prompt`, if given, is only echoed in the output."""

    prompt_token_ids: list[int]


@dataclass(frozen=True)
class Tokenization:
    """How one prompt becomes tokens."""

    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None  # tokens to keep; -1: as many as the model takes
    truncation_side: str = "left"  # the side that is cut; "left" keeps the last tokens
    do_lower_case: bool = False

    @classmethod
    def of(cls, kwargs: Mapping[str, Any] | None, add_special_tokens: bool = True) -> Tokenization:
        """vLLM's `tokenization_kwargs`. Raises ValueError or TypeError for those that mean nothing here."""
        given = dict(kwargs or {})
        padding = given.pop("padding", None)
        if padding not in (None, False, "do_not_pad"):
            raise _refusal("padding", padding, "None or False: prompts of any lengths run together")
        truncation = given.pop("truncation", None)
        max_length = given.pop("max_length", None)
        if truncation in (True, "longest_first"):
            given["truncate_prompt_tokens"] = -1 if max_length is None else max_length
        elif truncation not in (None, False, "do_not_truncate"):
            raise _refusal("truncation", truncation, "True or False")
        elif max_length is not None:
            raise _refusal("max_length", max_length, "None without truncation=True")
        if unknown := given.keys() - cls.__dataclass_fields__.keys():
            accepted = [*cls.__dataclass_fields__, "truncation", "max_length", "padding"]
            raise ValidationError(
                f"tokenization_kwargs: {', '.join(sorted(map(str, unknown)))} is not supported; "
                f"accepted are {', '.join(accepted)}",
                parameter="tokenization_kwargs",
                value=kwargs,
            )
        how = cls(**{"add_special_tokens": add_special_tokens, **_without_none(given)})
        how.verify()
        return how

    def verify(self) -> None:
        """Raises ValueError or TypeError for a value that means nothing."""
        for name in ("add_special_tokens", "do_lower_case"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"tokenization_kwargs: {name} must be True or False; got {getattr(self, name)!r}")
        keep = self.truncate_prompt_tokens
        if keep is not None:
            if isinstance(keep, bool) or not hasattr(keep, "__index__"):
                raise TypeError(f"tokenization_kwargs: truncate_prompt_tokens must be an integer; got {keep!r}")
            if keep < 1 and keep != -1:
                raise _refusal("truncate_prompt_tokens", keep, "-1 or an integer of at least 1")
        if self.truncation_side not in ("left", "right"):
            raise _refusal("truncation_side", self.truncation_side, "'left' or 'right'")

    def text(self, text: str) -> str:
        """The text to tokenise."""
        return text.lower() if self.do_lower_case else text

    def kept(self, num_tokens: int, max_model_len: int) -> slice:
        """The part of a prompt of `num_tokens` that is used. Raises ValueError if the limit is above the model's."""
        keep = self.truncate_prompt_tokens
        if keep is not None and keep > max_model_len:
            raise _refusal("truncate_prompt_tokens", keep, f"at most max_model_len={max_model_len}")
        if keep == -1:
            keep = max_model_len - 1  # one position stays for a new token
        if keep is None or keep >= num_tokens:
            return slice(None)
        return slice(keep) if self.truncation_side == "right" else slice(num_tokens - keep, None)


def check_unicode(parameter: str, text: str) -> None:
    """Raises ValueError if the text holds half of a surrogate pair: no tokenizer knows such a character."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        lone = text[err.start]
        raise ValidationError(
            f"{parameter}: the text is not valid Unicode, because character {err.start} is {lone!r}, "
            "a surrogate without its pair; accepted is text that UTF-8 can encode",
            parameter=parameter,
            value=text,
        ) from None


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _refusal(name: str, value: Any, accepted: str) -> ValidationError:
    return ValidationError(f"{name} must be {accepted}; got {value!r}.", parameter=name, value=value)
