"""`SamplingParams(logits_processors=[...])`: a request's own Python functions of its logits.

A function is `f(output_ids, logits)` or `f(prompt_ids, output_ids, logits)`. It gets the
token ids as lists and the logits [V] float32 of one row, and returns the new row. An error
in a function ends its request, and no other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanovllm.core.ability import ModelFacts
from nanovllm.core.batch import HostOnly, Part
from nanovllm.core.sequence import SequenceTable
from nanovllm.core.step import Array
from nanovllm.errors import ValidationError
from nanovllm.sampling.base import LogitsProcessor
from nanovllm.sampling_params import SamplingParams

RowFunction = Callable[..., Tensor]


@dataclass
class Function:
    """A user's function, and whether it takes the prompt's token ids too."""

    call: RowFunction
    takes_prompt: bool

    def __call__(self, prompt_ids: list[int], output_ids: list[int], logits: Tensor) -> Tensor:
        """logits [V] -> new logits [V]. Raises TypeError for a result of another form."""
        shape = logits.shape
        if self.takes_prompt:
            new = self.call(prompt_ids, output_ids, logits)
        else:
            new = self.call(output_ids, logits)
        if not isinstance(new, Tensor) or new.shape != shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise TypeError(
                f"logits_processors: {name_of(self.call)} must return a tensor of shape "
                f"{tuple(shape)}; got {got}"
            )
        return new


def read_function(function: object) -> Function:
    """The number of arguments without a default decides the form: two or three.

    Functions whose signature Python does not know get two. Raises ValidationError.
    """
    if isinstance(function, type):
        raise ValidationError(
            f"logits_processors must be functions in SamplingParams; got the class "
            f"{function.__name__} (classes belong to LLM(logits_processors=[...]))"
        )
    assert callable(function), "SamplingParams.verify refuses other objects"
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function written in C
        return Function(function, takes_prompt=False)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    has_rest = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    accepted = [p for p in parameters if p.kind in positional]
    required = [p for p in accepted if p.default is inspect.Parameter.empty]
    if len(required) == 3:
        return Function(function, takes_prompt=True)
    if len(required) < 3 and (has_rest or len(accepted) >= 2):
        return Function(function, takes_prompt=False)
    raise ValidationError(
        "logits_processors must be functions (output_ids, logits) or (prompt_ids, output_ids, "
        f"logits); got {name_of(function)}, which takes {len(required)} arguments"
    )


def name_of(function: object) -> str:
    return getattr(function, "__name__", None) or type(function).__name__


@dataclass
class Call:
    """What one request's functions get. Row `at` of the logits is the request's."""

    at: int
    functions: list[Function]
    prompt_ids: list[int]
    output_ids: list[int]

    def new_row(self, logits: Tensor) -> Tensor:
        for function in self.functions:
            logits = function(list(self.prompt_ids), list(self.output_ids), logits)
        return logits


@dataclass
class Calls:
    """One step's calls, and the errors that they raised: row of the logits -> error."""

    calls: list[Call]
    errors: dict[int, Exception] = field(default_factory=dict)


@dataclass
class RequestProcessorsPart(Part[Array]):
    calls: HostOnly[Calls]


class RequestProcessors(LogitsProcessor):
    name = "request_processors"

    def prepare(self, params: SamplingParams, facts: ModelFacts) -> list[Function] | None:
        if not params.logits_processors:
            return None
        return [read_function(function) for function in params.logits_processors]

    def needs_previous_token(self, prepared: object) -> bool:
        return True

    def part(
        self, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, users: np.ndarray
    ) -> RequestProcessorsPart[np.ndarray]:
        calls = []
        for i in users.tolist():
            seq = table.seqs[int(rows[i])]
            functions = seq.prepared[self.name]
            assert isinstance(functions, list)
            tokens = table.token_ids[rows[i], : lengths[i]].tolist()
            calls.append(Call(i, functions, tokens[: seq.prompt_len], tokens[seq.prompt_len :]))
        return RequestProcessorsPart(HostOnly(Calls(calls)))

    def apply(
        self,
        logits: Tensor,
        part: RequestProcessorsPart[Tensor],
        rows: Tensor,
        last_tokens: Tensor,
    ) -> Tensor:
        step = part.calls.value
        for call in step.calls if step else ():
            try:
                logits[call.at] = call.new_row(logits[call.at])
            except torch.cuda.OutOfMemoryError:  # concerns the whole step
                raise
            except Exception as error:
                assert step is not None
                step.errors[call.at] = error
        return logits
