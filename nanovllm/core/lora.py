"""LoRA on the host: which tokens of a step use which adapter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanovllm.core.ability import ModelFacts, StepAbility
from nanovllm.core.batch import Part
from nanovllm.core.sequence import SequenceTable
from nanovllm.core.step import Array, Step
from nanovllm.sampling_params import SamplingParams

COLUMN = "adapter"  # of the sequence table: the number of the sequence's adapter


@dataclass
class LoRAPart(Part[Array]):
    """The adapters of a step's tokens, by their numbers. 0 is the model without adapter."""

    of_tokens: Array  # [T] int32
    only: int  # the adapter of every token, or 0 where the tokens differ


class LoRA(StepAbility):
    """A request uses it by `lora_request`, not by its sampling parameters."""

    name = "lora"
    columns = {COLUMN: np.int32}

    def prepare(self, params: SamplingParams, facts: ModelFacts) -> object | None:
        return None

    def part(
        self, table: SequenceTable, step: Step, query_start: np.ndarray, users: np.ndarray
    ) -> LoRAPart[np.ndarray]:
        adapters = np.zeros(len(step.rows), np.int32)
        adapters[users] = table.columns[COLUMN][step.rows[users]]
        is_uniform = bool((adapters == adapters[0]).all())
        return LoRAPart(
            of_tokens=np.repeat(adapters, np.diff(query_start)),
            only=int(adapters[0]) if is_uniform else 0,
        )
