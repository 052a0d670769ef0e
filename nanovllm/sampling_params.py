"""vLLM's SamplingParams and BeamSearchParams with their rules. Knows no model.

The records are mutable. `verify` therefore runs at construction, and again when the
engine adds a request.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from math import inf
from numbers import Integral, Real
from typing import Any, cast

from nanovllm.errors import ValidationError
from nanovllm.inputs import check_unicode

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5  # temperatures below this are greedy
MIN_TEMPERATURE = 1e-2  # logits divided by less may overflow in half precision
# The limits of float32, because parameters are float32 on the device.
LARGEST_FLOAT32 = 3.4028234e38
SMALLEST_FLOAT32 = 1.17549436e-38


class RequestOutputKind(Enum):
    """The content of each RequestOutput of a stream."""

    CUMULATIVE = 0  # all text and tokens so far
    DELTA = 1  # the new text and tokens
    FINAL_ONLY = 2  # everything, in one output at the end


@dataclass(frozen=True)
class _Rule:
    """The rule of one number. Numbers of numpy are accepted too."""

    kind: type[int] | type[float]  # the accepted number becomes this type
    accepted: str  # the same as `is_accepted`, in words
    is_accepted: Callable[[float], bool]


_AT_LEAST_1 = _Rule(int, "an integer of at least 1", lambda v: v >= 1)
_TEMPERATURE = _Rule(
    float, "a float32 number of at least 0 (0 is greedy)", lambda v: 0 <= v <= LARGEST_FLOAT32
)
_REPETITION = _Rule(
    float, "a float32 number above 0", lambda v: SMALLEST_FLOAT32 <= v <= LARGEST_FLOAT32
)
_PENALTY = _Rule(float, "a number from -2 to 2", lambda v: -2 <= v <= 2)
_BIAS = _Rule(
    float,
    "a dict whose values are float32 numbers or -inf",
    lambda v: v == -inf or abs(v) <= LARGEST_FLOAT32,
)
_LOGPROBS = _Rule(
    int, "None, True or an integer of at least -1 (-1: the vocabulary)", lambda v: v >= -1
)
_TRUNCATE = _Rule(
    int, "None, -1 (max_model_len) or an integer of at least 1", lambda v: v == -1 or v >= 1
)
_TOKEN_ID = _Rule(int, "None or hold token ids, which are integers", lambda v: True)
_SEED = _Rule(int, "None or an integer of at most 64 bits", lambda v: -(2**63) <= v < 2**64)
_MAX_TOKENS = _Rule(int, "None (up to max_model_len) or an integer of at least 1", lambda v: v >= 1)

_NUMBERS = {
    "n": _AT_LEAST_1,
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": _REPETITION,
    "temperature": _TEMPERATURE,
    "top_p": _Rule(float, "a number above 0 and at most 1", lambda v: 0 < v <= 1),
    "top_k": _Rule(int, "an integer of at least -1 (0 and -1: off)", lambda v: v >= -1),
    "min_p": _Rule(float, "a number from 0 to 1", lambda v: 0 <= v <= 1),
    "min_tokens": _Rule(int, "an integer of at least 0", lambda v: v >= 0),
}
_NUMBERS_OR_NONE = {
    "seed": _SEED,
    "max_tokens": _MAX_TOKENS,
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "truncate_prompt_tokens": _TRUNCATE,
}
_BEAM_NUMBERS = {
    "beam_width": _AT_LEAST_1,
    "max_tokens": _AT_LEAST_1,
    "temperature": _TEMPERATURE,
    "length_penalty": _Rule(float, "a finite number", lambda v: -inf < v < inf),
}
_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
# Parameters of vLLM that this engine lacks -> (neutral values, the reason).
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_NO_GRAMMAR = "this engine has no grammar-constrained decoding"
_NEUTRAL: dict[str, tuple[tuple[object, ...], str]] = {
    "structured_outputs": ((None,), _NO_GRAMMAR),
    "guided_decoding": ((None,), _NO_GRAMMAR),
    "use_beam_search": ((False, None), "beam search is LLM.beam_search with BeamSearchParams"),
    "length_penalty": ((1.0, None), "length_penalty is a parameter of BeamSearchParams"),
    "early_stopping": ((False, None), "early_stopping was a parameter of the former beam search"),
}


@dataclass
class StructuredOutputsParams:
    """A constraint on the form of the output, of exactly one kind.

    No request accepts one. The class exists because scripts import the name.
    """

    json: str | dict[str, object] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in _CONSTRAINTS if getattr(self, kind) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValidationError(
                f"{type(self).__name__} takes exactly one of {', '.join(_CONSTRAINTS)}; got {got}."
            )


@dataclass
class GuidedDecodingParams(StructuredOutputsParams):
    """vLLM's name until 0.11, for scripts that import it."""

    backend: str | None = None

    @classmethod
    def from_optional(cls, **kwargs: Any) -> GuidedDecodingParams | None:
        """The constraint among `kwargs`, or None if all are None."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        return cls(**given) if given.keys() - {"backend", "whitespace_pattern"} else None


@dataclass(repr=False)
class SamplingParams:
    """Options of sampling and stopping. Names, order, defaults and rules are vLLM's.

    The constructor checks the values and normalises them (`verify`). It raises TypeError
    for a wrong type and ValidationError, a ValueError, for a wrong value.

    The stop string that completes first ends the text. If several complete with the same
    token, the match that begins first wins, then the string that is listed first.
    Presence and frequency penalties count generated tokens. The repetition penalty counts
    the prompt's tokens too.
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
    logits_processors: list[Callable[..., object]] | None = None
    guided_decoding: object = None
    truncate_prompt_tokens: int | None = None
    extra_args: dict[str, object] | None = None

    # vLLM's tuple of field names, filled in below. Without an annotation, because clients
    # take the keys of __annotations__ for the fields.
    __struct_fields__ = tuple[str, ...]()

    def __post_init__(self) -> None:
        self.verify()

    @classmethod
    def from_optional(cls, **kwargs: Any) -> SamplingParams:
        """`SamplingParams(**kwargs)` without the arguments that are None.

        `logit_bias` may have strings of digits as keys, because JSON has no other keys.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        if "max_tokens" in kwargs:
            given["max_tokens"] = kwargs["max_tokens"]  # None stands for no limit
        biases = given.get("logit_bias")
        if isinstance(biases, Mapping):
            given["logit_bias"] = {_json_token_id(key): bias for key, bias in biases.items()}
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
        """Whether the prompt may use cached prefixes.

        False with prompt_logprobs, because the cache holds no logits.
        """
        return not self.skip_reading_prefix_cache and self.prompt_logprobs is None

    def verify(self) -> None:
        """Checks every rule that needs no model, and normalises each field.

        Raises TypeError or ValidationError. A second call changes nothing.
        """
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):
                setattr(self, name, 1 if value else None)
        _check_numbers(self, _NUMBERS)
        _check_numbers(self, _NUMBERS_OR_NONE, optional=True)
        _check_flags(self, _FLAGS)
        if self.skip_reading_prefix_cache is not None:
            _check_flags(self, ("skip_reading_prefix_cache",))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(f"output_kind must be a RequestOutputKind; got {self.output_kind!r}.")
        self._verify_lists()
        self._normalise_numbers()
        self._verify_combinations()
        _check_neutral(self, _NEUTRAL)

    def _verify_lists(self) -> None:
        self.stop = _strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        self.bad_words = _strings("bad_words", self.bad_words)
        stop_token_ids = [] if self.stop_token_ids is None else self.stop_token_ids
        self.stop_token_ids = _token_ids("stop_token_ids", stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
        functions = self.logits_processors or []
        if not isinstance(functions, (list, tuple)) or not all(map(callable, functions)):
            raise TypeError(
                f"logits_processors must be None or a list of functions; got {functions!r}."
            )
        if self.extra_args is not None and not isinstance(self.extra_args, dict):
            raise TypeError(f"extra_args must be None or a dict; got {self.extra_args!r}.")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise TypeError(
                    "logit_bias must be None or a dict of token id to number; "
                    f"got {self.logit_bias!r}."
                )
            ids = _token_ids("logit_bias", self.logit_bias)
            biases = [_number("logit_bias", bias, _BIAS) for bias in self.logit_bias.values()]
            self.logit_bias = dict(zip(ids, biases))

    def _normalise_numbers(self) -> None:
        if self.seed == -1:
            self.seed = None
        self.top_k = max(self.top_k, 0)
        if self.is_greedy:
            self.temperature = 0.0
            self.top_p = 1.0
            self.top_k = 0
            self.min_p = 0.0
        elif self.temperature < MIN_TEMPERATURE:
            logger.warning(
                "temperature=%s is raised to %s, because logits may overflow.",
                self.temperature,
                MIN_TEMPERATURE,
            )
            self.temperature = MIN_TEMPERATURE

    def _verify_combinations(self) -> None:
        if self.is_greedy and self.n > 1:
            accepted = "1 when temperature is 0, because greedy completions are equal"
            raise _refusal("n", self.n, accepted)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refusal("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        if self.stop and not self.detokenize:
            accepted = "empty when detokenize=False, because stop strings are found in the text"
            raise _refusal("stop", self.stop, accepted)
        if self.allowed_token_ids == []:
            raise _refusal("allowed_token_ids", [], "None or a list that is not empty")
        if self.best_of not in (None, self.n):
            accepted = f"None or n={self.n}, because all n completions are returned"
            raise _refusal("best_of", self.best_of, accepted)

    def verify_for_model(
        self,
        vocab_size: int,
        max_logprobs: int,
        has_tokenizer: bool,
        is_known: Callable[[int], bool] = lambda token_id: False,
    ) -> None:
        """Checks the rules that need facts of the model. Raises ValidationError.

        Changes the record: logprobs of -1 become `vocab_size`. A top_k of the whole
        vocabulary becomes 0. `detokenize` becomes False without a tokenizer.

        max_logprobs: the largest accepted number of logprobs; -1 is no limit.
        is_known: whether the tokenizer knows a token id above the model's vocabulary.
        Such ids are dropped, because the model cannot sample them. Others are refused.
        """
        if self.top_k >= vocab_size:
            self.top_k = 0
        self._drop_unsampled_ids(vocab_size, is_known)
        for name in ("logprobs", "prompt_logprobs"):
            self._limit_logprobs(name, vocab_size, max_logprobs)
        if not has_tokenizer:
            for name in ("stop", "bad_words"):
                value = getattr(self, name)
                if value:
                    accepted = "empty, because the engine has no tokenizer"
                    raise _refusal(name, value, f"{accepted} (skip_tokenizer_init=True)")
            self.detokenize = False

    def _limit_logprobs(self, name: str, vocab_size: int, max_logprobs: int) -> None:
        value = getattr(self, name)
        if value is None:
            return
        count = vocab_size if value == -1 else value
        if 0 <= max_logprobs < count:
            accepted = f"at most max_logprobs={max_logprobs} (an argument of LLM; -1: no limit)"
            if value == -1:
                accepted += f", where -1 stands for {vocab_size}"
            raise _refusal(name, value, accepted)
        setattr(self, name, min(count, vocab_size))

    def _drop_unsampled_ids(self, vocab_size: int, is_known: Callable[[int], bool]) -> None:
        last = vocab_size - 1
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            ids = getattr(self, name) or []
            unknown = [i for i in ids if i < 0 or (i > last and not is_known(i))]
            if unknown:
                accepted = f"made of token ids inside the vocabulary (0 to {last})"
                raise _refusal(name, unknown, accepted)
            kept = [i for i in ids if i <= last]
            if ids and not kept and name == "allowed_token_ids":
                accepted = f"a list with at least one token id of the model (0 to {last})"
                raise _refusal(name, ids, accepted)
            if isinstance(ids, dict):
                setattr(self, name, {i: ids[i] for i in kept})
            elif ids:
                setattr(self, name, kept)

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in (field.default, []):
                shown.append(f"{field.name}={value!r}")
        return f"SamplingParams({', '.join(shown)})"


SamplingParams.__struct_fields__ = tuple(f.name for f in fields(SamplingParams))


@dataclass
class BeamSearchParams:
    """Parameters of `LLM.beam_search`.

    The score of a beam is its cumulative logprob / generated tokens ** length_penalty.
    """

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
        """Checks every rule. Raises TypeError or ValidationError."""
        _check_numbers(self, _BEAM_NUMBERS)
        _check_flags(self, ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"))
        _check_neutral(self, {"structured_outputs": _NEUTRAL["structured_outputs"]})


def _refusal(name: str, value: object, accepted: str) -> ValidationError:
    return ValidationError(
        f"{name} must be {accepted}; got {value!r}.", parameter=name, value=value
    )


def _number(name: str, value: object, rule: _Rule) -> float:
    """`value` as an int or float of Python.

    Raises TypeError for a bool, because a bool such as in `n=True` is a mistake.
    """
    number_class = Integral if rule.kind is int else Real
    if isinstance(value, bool) or not isinstance(value, number_class):
        raise TypeError(f"{name} must be {rule.accepted}; got {value!r}.")
    number = cast(float, value)
    if not rule.is_accepted(number):
        raise _refusal(name, value, rule.accepted)
    return rule.kind(number)


def _check_numbers(record: object, rules: Mapping[str, _Rule], optional: bool = False) -> None:
    """Checks and normalises the fields in `rules`. optional: None is accepted too."""
    for name, rule in rules.items():
        value = getattr(record, name)
        if value is not None or not optional:
            setattr(record, name, _number(name, value, rule))


def _check_flags(record: object, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}.")


def _check_neutral(record: object, rules: Mapping[str, tuple[tuple[object, ...], str]]) -> None:
    for name, (neutral_values, reason) in rules.items():
        value = getattr(record, name)
        if value in neutral_values:
            continue
        accepted = f"{neutral_values[0]!r}, because {reason}"
        if reason is not _NO_GRAMMAR:
            raise _refusal(name, value, accepted)
        # Without the value, because a schema may fill pages.
        raise ValidationError(
            f"{name} must be {accepted}; got {_kind_of_constraint(value)}.",
            parameter=name,
            value=value,
        )


def _kind_of_constraint(value: object) -> str:
    kinds = [kind for kind in _CONSTRAINTS if getattr(value, kind, None) is not None]
    kind = f" with {kinds[0]}" if kinds else ""
    return f"a {type(value).__name__}{kind}"


def _strings(name: str, value: object) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        accepted = "None, a string or a list of strings"
        if name != "stop":
            accepted = "None or a list of strings"
        raise TypeError(f"{name} must be {accepted}; got {value!r}.")
    if "" in value:
        raise _refusal(name, value, "a list of strings of at least one character")
    for text in value:
        check_unicode(name, text)
    return list(value)


def _token_ids(name: str, value: object) -> list[int]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be {_TOKEN_ID.accepted}; got {value!r}.")
    return [int(_number(name, item, _TOKEN_ID)) for item in value]


def _json_token_id(key: object) -> object:
    if isinstance(key, str) and key.isdecimal():
        return int(key)
    return key
