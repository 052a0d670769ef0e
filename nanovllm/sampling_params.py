"""What a request asks for: vLLM's SamplingParams and BeamSearchParams with their rules.

The records are mutable, so they are checked when built and again, by `verify`, when a request is added. Nothing here
knows a model or a tokenizer; `verify_for_model` is told what it needs of them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from math import inf
from numbers import Integral, Real
from typing import Any

from nanovllm.errors import ValidationError
from nanovllm.inputs import check_unicode

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5  # temperatures below this are greedy
MIN_TEMPERATURE = 1e-2  # logits divided by less than this overflow in half precision
FLOAT32 = 3.4028234e38  # the largest number that float32 holds; parameters travel to the device in it
SMALLEST_FLOAT32 = 1.17549436e-38


class RequestOutputKind(Enum):
    """What each RequestOutput of a stream holds: all text so far, the new text only, or nothing until the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


# What a number becomes, what is accepted in words, and in code; numpy's numbers are as good as Python's.
_Rule = tuple[type, str, Callable[[Any], bool]]
_AT_LEAST_1: _Rule = (int, "an integer of at least 1", lambda v: v >= 1)
_TEMPERATURE: _Rule = (float, "a float32 number of at least 0 (0 is greedy)", lambda v: 0 <= v <= FLOAT32)
_REPETITION: _Rule = (float, "a float32 number above 0", lambda v: SMALLEST_FLOAT32 <= v <= FLOAT32)
_BIAS: _Rule = (
    float,
    "a dict whose values are float32 numbers, or -inf: never",
    lambda v: v == -inf or abs(v) <= FLOAT32,
)
_LOGPROBS: _Rule = (int, "None, True or an integer of at least -1 (-1: the vocabulary)", lambda v: v >= -1)
_NUMBERS: dict[str, _Rule] = {
    "n": _AT_LEAST_1,
    "presence_penalty": (float, "a number from -2 to 2", lambda v: -2 <= v <= 2),
    "frequency_penalty": (float, "a number from -2 to 2", lambda v: -2 <= v <= 2),
    "repetition_penalty": _REPETITION,
    "temperature": _TEMPERATURE,
    "top_p": (float, "a number above 0 and at most 1", lambda v: 0 < v <= 1),
    "top_k": (int, "an integer of at least -1 (0 and -1: off)", lambda v: v >= -1),
    "min_p": (float, "a number from 0 to 1", lambda v: 0 <= v <= 1),
    "min_tokens": (int, "an integer of at least 0", lambda v: v >= 0),
}
_NUMBERS_OR_NONE: dict[str, _Rule] = {
    "seed": (int, "None or an integer of at most 64 bits", lambda v: -(2**63) <= v < 2**64),
    "max_tokens": (int, "None (up to max_model_len) or an integer of at least 1", lambda v: v >= 1),
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "truncate_prompt_tokens": (
        int,
        "None, -1 (max_model_len) or an integer of at least 1",
        lambda v: v == -1 or v >= 1,
    ),
}
_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
# What vLLM has or had and this engine does not: the values that change nothing, and why others are refused.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "structured_outputs": ((None,), "this engine does no grammar-constrained decoding"),
    "guided_decoding": ((None,), "this engine does no grammar-constrained decoding"),
    "logits_processors": ((None, []), "use logit_bias, allowed_token_ids or bad_words"),
    "use_beam_search": ((False, None), "call LLM.beam_search with BeamSearchParams"),
    "length_penalty": ((1.0, None), "it belongs to BeamSearchParams"),
    "early_stopping": ((False, None), "it belonged to beam search"),
    "extra_args": ((None, {}), "this engine has no plug-ins that would read them"),
}


@dataclass
class StructuredOutputsParams:
    """A constraint on the output's form: exactly one kind. It can be built, so that scripts import; no request takes it."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValidationError(f"StructuredOutputsParams takes exactly one of {', '.join(kinds)}; got {got}.")


@dataclass(repr=False)
class SamplingParams:
    """How to sample and when to stop; names, order, defaults and rules are vLLM's.

    Building one checks and normalises it (see `verify`): raises TypeError for a wrong type, ValidationError (a ValueError)
    for a wrong value. When several stop strings match in the same step, the match that begins first in the text wins, and
    of those that begin together the one listed first. Presence and frequency penalties count generated tokens,
    the repetition penalty counts the prompt's too.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_reading_prefix_cache: bool | None = None
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool = False
    logits_processors: list[Any] | None = None
    guided_decoding: Any = None
    truncate_prompt_tokens: int | None = None
    extra_args: dict[str, Any] | None = None

    __struct_fields__ = tuple[str, ...]()  # filled below; unannotated, as clients take __annotations__ for the fields

    def __post_init__(self) -> None:
        self.verify()

    @classmethod
    def from_optional(cls, **kwargs: Any) -> SamplingParams:
        """SamplingParams of the arguments that are not None; `logit_bias` may have JSON's string keys."""
        # max_tokens=None has a meaning of its own.
        given = {name: value for name, value in kwargs.items() if value is not None or name == "max_tokens"}
        if isinstance(bias := given.get("logit_bias"), Mapping):
            given["logit_bias"] = {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in bias.items()}
        return cls(**given)

    def clone(self) -> SamplingParams:
        """A copy that shares no list or dict with this one."""
        new = copy.copy(self)
        vars(new).update((name, copy.copy(value)) for name, value in vars(self).items())
        return new

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def reads_prefix_cache(self) -> bool:
        """False where asked for, and with prompt_logprobs: a position read from the cache has no logits."""
        return not self.skip_reading_prefix_cache and self.prompt_logprobs is None

    def verify(self) -> None:
        """Checks every rule that needs no model, and brings each field to its one canonical form; again and again is fine."""
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(value := getattr(self, name), bool):
                setattr(self, name, 1 if value else None)
        for name, rule in _NUMBERS.items():
            setattr(self, name, _number(name, getattr(self, name), rule))
        for name, rule in _NUMBERS_OR_NONE.items():
            if (value := getattr(self, name)) is not None:
                setattr(self, name, _number(name, value, rule))
        _check_flags(self, _FLAGS)
        if self.skip_reading_prefix_cache is not None:
            _check_flags(self, ("skip_reading_prefix_cache",))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(f"output_kind must be a RequestOutputKind; got {self.output_kind!r}.")
        self.stop = _strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        self.bad_words = _strings("bad_words", self.bad_words)
        self.stop_token_ids = _token_ids("stop_token_ids", [] if self.stop_token_ids is None else self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise TypeError(f"logit_bias must be None or a dict of token id to number; got {self.logit_bias!r}.")
            ids = _token_ids("logit_bias", self.logit_bias)
            self.logit_bias = {i: _number("logit_bias", v, _BIAS) for i, v in zip(ids, self.logit_bias.values())}

        if self.seed == -1:
            self.seed = None
        self.top_k = max(self.top_k, 0)
        if self.is_greedy:
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0
            if self.n > 1:
                raise _refusal("n", self.n, "1 when temperature is 0, as greedy completions are all the same")
        elif self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature=%s is raised to %s: less may overflow.", self.temperature, MIN_TEMPERATURE)
            self.temperature = MIN_TEMPERATURE
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refusal("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        if self.stop and not self.detokenize:
            raise _refusal("stop", self.stop, "empty when detokenize=False, as stop strings are found in the text")
        if self.allowed_token_ids == []:
            raise _refusal("allowed_token_ids", [], "None or a list that is not empty")
        if self.best_of not in (None, self.n):
            raise _refusal("best_of", self.best_of, f"None or n={self.n}: all n completions are returned")
        _check_neutral(self, _NEUTRAL)

    def verify_for_model(
        self,
        vocab_size: int,
        max_logprobs: int,
        has_tokenizer: bool,
        is_known: Callable[[int], bool] = lambda token_id: False,
    ) -> None:
        """Checks what depends on the model, on the request's own clone: -1 logprobs become `vocab_size`, a top_k that keeps
        everything 0, and without a tokenizer `detokenize` False. `max_logprobs` -1 is no limit. Raises ValidationError.

        is_known: whether the tokenizer knows an id for which the model has no row. Such ids are dropped, because they can
        never be sampled; others outside the vocabulary are refused.
        """
        if self.top_k >= vocab_size:
            self.top_k = 0
        self._drop_ids_without_row(vocab_size, is_known)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                count = vocab_size if value == -1 else value
                if 0 <= max_logprobs < count:
                    accepted = f"at most max_logprobs={max_logprobs} (an argument of LLM; -1: no limit)"
                    raise _refusal(name, value, accepted + f", where -1 stands for {vocab_size}" * (value == -1))
                setattr(self, name, min(count, vocab_size))
        if not has_tokenizer:
            for name in ("stop", "bad_words"):
                if value := getattr(self, name):
                    raise _refusal(name, value, "empty, as the engine has no tokenizer (skip_tokenizer_init=True)")
            self.detokenize = False

    def _drop_ids_without_row(self, vocab_size: int, is_known: Callable[[int], bool]) -> None:
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            ids = getattr(self, name) or []
            if bad := [i for i in ids if i < 0 or (i >= vocab_size and not is_known(i))]:
                raise _refusal(name, bad, f"of token ids inside the vocabulary (0 to {vocab_size - 1})")
            if kept := [i for i in ids if i < vocab_size]:
                setattr(self, name, {i: ids[i] for i in kept} if isinstance(ids, dict) else kept)
            elif ids and name == "allowed_token_ids":
                raise _refusal(name, ids, f"a list with an id that the model has a row for (0 to {vocab_size - 1})")
            elif ids:
                setattr(self, name, type(ids)())

    def __repr__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) not in (f.default, []))
        return f"SamplingParams({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


SamplingParams.__struct_fields__ = tuple(f.name for f in fields(SamplingParams))


@dataclass
class BeamSearchParams:
    """Parameters of `LLM.beam_search`: a beam's score is its cumulative logprob / generated tokens ** length_penalty."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self.verify()

    def verify(self) -> None:
        """Checks every rule; raises TypeError or ValidationError."""
        self.beam_width = _number("beam_width", self.beam_width, _AT_LEAST_1)
        self.max_tokens = _number("max_tokens", self.max_tokens, _AT_LEAST_1)
        self.temperature = _number("temperature", self.temperature, _TEMPERATURE)
        finite = (float, "a finite number", lambda v: -inf < v < inf)
        self.length_penalty = _number("length_penalty", self.length_penalty, finite)
        _check_flags(self, ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"))
        _check_neutral(self, {"structured_outputs": _NEUTRAL["structured_outputs"]})


def _refusal(name: str, value: Any, accepted: str) -> ValidationError:
    return ValidationError(f"{name} must be {accepted}; got {value!r}.", parameter=name, value=value)


def _number(name: str, value: Any, rule: _Rule) -> Any:
    """`value` as Python's own int or float. A bool is refused: it would hide a mistake, as in `n=True`."""
    kind, accepted, is_accepted = rule
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        raise TypeError(f"{name} must be {accepted}; got {value!r}.")
    if not is_accepted(value):
        raise _refusal(name, value, accepted)
    return kind(value)


def _check_flags(record: Any, names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(value := getattr(record, name), bool):
            raise TypeError(f"{name} must be True or False; got {value!r}.")


def _check_neutral(record: Any, neutral: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    for name, (values, reason) in neutral.items():
        if (value := getattr(record, name)) not in values:
            raise _refusal(name, value, f"left at {values[0]!r}: it would change results, and {reason}")


def _strings(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(s, str) for s in value):
        raise TypeError(
            f"{name} must be None or a list of strings{' or one string' * (name == 'stop')}; got {value!r}."
        )
    if "" in value:
        raise _refusal(name, value, "a list of strings of at least one character")
    for text in value:
        check_unicode(name, text)
    return list(value)


def _token_ids(name: str, value: Any) -> list[int]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be None or hold token ids, which are integers; got {value!r}.")
    return [_number(name, i, (int, "None or hold token ids, which are integers", lambda i: True)) for i in value]
