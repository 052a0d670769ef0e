"""The host half of an optional ability: what it prepares of a request, and its part of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from nanovllm.core.batch import Part
from nanovllm.core.sequence import SequenceTable
from nanovllm.core.step import Step
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class ModelFacts:
    """What abilities may know of the model when they prepare a request."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    encode: Callable[[str], list[int]]  # text -> token ids, without special tokens
    logits_processors: object | None = None  # the engine's own (sampling/engine_processors.py)


class Ability(ABC):
    """One optional ability. Invariant: a request that does not use it carries no trace of it."""

    name: str
    columns: Mapping[str, type] = {}  # the columns of the sequence table that it reads
    first_completion_only = False  # of a request's n sequences only the first uses the ability

    @abstractmethod
    def prepare(self, params: SamplingParams, facts: ModelFacts) -> object | None:
        """What a sequence keeps for this ability; None where the request does not use it.

        `Columns` go into the sequence table. Raises ValidationError for a value that is
        refused.
        """

    def needs_previous_token(self, prepared: object) -> bool:
        """Whether the part of a step cannot be made before the last token is on the host."""
        return False


class SamplingAbility(Ability):
    """An ability that concerns the logits of sampled tokens."""

    @abstractmethod
    def part(
        self, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, users: np.ndarray
    ) -> Part[np.ndarray] | None:
        """This step's part, in numpy.

        rows: [K] the table rows that sample. lengths: [K] how many tokens each sequence
        has. users: the indices into both of the sequences that use this ability.
        """


class StepAbility(Ability):
    """An ability that concerns other tokens of a step than the sampled ones."""

    @abstractmethod
    def part(
        self, table: SequenceTable, step: Step, query_start: np.ndarray, users: np.ndarray
    ) -> Part[np.ndarray] | None:
        """This step's part, in numpy.

        query_start: [S + 1] where the tokens of each of the step's sequences begin.
        users: the indices into `step.rows` of the sequences that use this ability.
        """
