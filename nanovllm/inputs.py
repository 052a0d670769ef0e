"""The dict forms of a prompt, and the options of tokenization. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from nanovllm.errors import ValidationError


class _Salted(TypedDict, total=False):
    cache_salt: str  # only prompts with the same salt share cached prefixes


class TextPrompt(_Salted):
    """Text that the engine tokenizes."""

    prompt: str


class _Echoed(_Salted, total=False):
    prompt: str


class TokensPrompt(_Echoed):
    """Token ids. The output echoes the optional text `prompt`."""

    prompt_token_ids: list[int]


@dataclass(frozen=True)
class Tokenization:
    """Options of turning one prompt into tokens."""

    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None  # tokens to keep; -1: max_model_len - 1
    truncation_side: str = "left"  # "left" drops the first tokens, "right" the last
    do_lower_case: bool = False

    @classmethod
    def of(
        cls, kwargs: Mapping[str, object] | None, add_special_tokens: bool = True
    ) -> Tokenization:
        """vLLM's `tokenization_kwargs`.

        Raises ValueError or TypeError for a refused value.
        add_special_tokens: the default for `kwargs` without that key.
        """
        given = dict(kwargs or {})
        _replace_hugging_face_names(given)
        accepted = [f.name for f in fields(cls)]
        unknown = sorted(str(name) for name in given if name not in accepted)
        if unknown:
            names = ", ".join([*accepted, "truncation", "max_length", "padding"])
            raise ValidationError(
                f"tokenization_kwargs: {', '.join(unknown)} is not supported; accepted are {names}",
                parameter="tokenization_kwargs",
                value=kwargs,
            )
        chosen: dict[str, Any] = {"add_special_tokens": add_special_tokens}
        for name, value in given.items():
            if value is not None:
                chosen[name] = value
        how = cls(**chosen)
        how.verify()
        return how

    def verify(self) -> None:
        """Raises ValueError or TypeError for a refused value."""
        for name in ("add_special_tokens", "do_lower_case"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"tokenization_kwargs: {name} must be True or False; got {value!r}")
        keep = self.truncate_prompt_tokens
        if keep is not None:
            if isinstance(keep, bool) or not hasattr(keep, "__index__"):
                raise TypeError(
                    f"tokenization_kwargs: truncate_prompt_tokens must be an integer; got {keep!r}"
                )
            if keep < 1 and keep != -1:
                raise _refusal("truncate_prompt_tokens", keep, "-1 or an integer of at least 1")
        if self.truncation_side not in ("left", "right"):
            raise _refusal("truncation_side", self.truncation_side, "'left' or 'right'")

    def text(self, text: str) -> str:
        """The text for the tokenizer."""
        return text.lower() if self.do_lower_case else text

    def kept(self, num_tokens: int, max_model_len: int) -> slice:
        """The kept part of a prompt of `num_tokens`.

        Raises ValueError if truncate_prompt_tokens is above max_model_len.
        """
        keep = self.truncate_prompt_tokens
        if keep is not None and keep > max_model_len:
            raise _refusal("truncate_prompt_tokens", keep, f"at most max_model_len={max_model_len}")
        if keep == -1:
            keep = max_model_len - 1  # because one position is for a new token
        if keep is None or keep >= num_tokens:
            return slice(None)
        if self.truncation_side == "right":
            return slice(keep)
        return slice(num_tokens - keep, None)


def check_unicode(parameter: str, text: str) -> None:
    """Raises ValueError for half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        lone = text[err.start]
        raise ValidationError(
            f"{parameter}: the text is not valid Unicode, because character {err.start} is "
            f"{lone!r}, a surrogate without its pair; accepted is text that UTF-8 can encode",
            parameter=parameter,
            value=text,
        ) from None


def _replace_hugging_face_names(given: dict[str, object]) -> None:
    """Replaces `padding`, `truncation` and `max_length` by fields of `Tokenization`."""
    padding = given.pop("padding", None)
    if padding not in (None, False, "do_not_pad"):
        raise _refusal("padding", padding, "None or False, because prompts are never padded")
    truncation = given.pop("truncation", None)
    max_length = given.pop("max_length", None)
    if truncation in (True, "longest_first"):
        given["truncate_prompt_tokens"] = -1 if max_length is None else max_length
    elif truncation not in (None, False, "do_not_truncate"):
        raise _refusal("truncation", truncation, "True or False")
    elif max_length is not None:
        raise _refusal("max_length", max_length, "None without truncation=True")


def _refusal(name: str, value: object, accepted: str) -> ValidationError:
    return ValidationError(
        f"{name} must be {accepted}; got {value!r}.", parameter=name, value=value
    )
