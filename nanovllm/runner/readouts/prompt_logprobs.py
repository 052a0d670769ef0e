"""`prompt_logprobs`: the log-probability of each prompt token after the tokens before it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanovllm.core.ability import ModelFacts, StepAbility
from nanovllm.core.batch import Batch, Part
from nanovllm.core.sequence import Columns, Sequence, SequenceTable
from nanovllm.core.step import Array, Logprobs, Step
from nanovllm.models.base import LanguageModel
from nanovllm.runner.readouts.base import Readout, Requests
from nanovllm.runner.readouts.next_tokens import logits_at
from nanovllm.sampling.base import ROWS_AT_ONCE
from nanovllm.sampling.logprobs import joined, logprobs
from nanovllm.sampling_params import SamplingParams


@dataclass
class PromptLogprobsPart(Part[Array]):
    """The Q tokens of the step whose successors are prompt tokens that are asked for."""

    at: Array  # [Q] int32 indices into the step's tokens
    targets: Array  # [Q] int32 the prompt token that follows each
    k: int  # the most likely tokens that the most demanding request asks for


@dataclass
class Asked:
    """The next `count` rows of the result are of `seq`'s prompt tokens from `position` on."""

    seq: Sequence
    position: int
    count: int


class PromptLogprobs(StepAbility, Readout[Logprobs[Tensor]]):
    name = "prompt_logprobs"
    columns = {"num_prompt_logprobs": np.int32}
    first_completion_only = True

    def __init__(self) -> None:
        self.asked: deque[list[Asked]] = deque()  # one list for each step in flight

    def clear(self) -> None:
        self.asked.clear()

    def prepare(self, params: SamplingParams, facts: ModelFacts) -> Columns | None:
        k = params.prompt_logprobs
        return None if k is None else Columns(num_prompt_logprobs=k)

    def part(
        self, table: SequenceTable, step: Step, query_start: np.ndarray, users: np.ndarray
    ) -> PromptLogprobsPart[np.ndarray] | None:
        asked: list[Asked] = []
        at: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        k = 0
        for i in users.tolist():
            row, start = int(step.rows[i]), int(step.starts[i])
            seq = table.seqs[row]
            stop = min(int(step.ends[i]), seq.prompt_len - 1)
            if start < stop:
                asked.append(Asked(seq, start + 1, stop - start))
                at.append(np.arange(stop - start, dtype=np.int32) + query_start[i])
                targets.append(table.token_ids[row, start + 1 : stop + 1])
                k = max(k, int(table.columns["num_prompt_logprobs"][row]))
        if not asked:
            return None
        self.asked.append(asked)
        return PromptLogprobsPart(np.concatenate(at), np.concatenate(targets), k)

    def read(self, model: LanguageModel, hidden: Tensor, batch: Batch[Tensor]) -> Logprobs[Tensor]:
        part = batch.parts[self.name]
        assert isinstance(part, PromptLogprobsPart)
        pieces = [
            logprobs(logits_at(model, hidden, at), targets, part.k)
            for at, targets in zip(part.at.split(ROWS_AT_ONCE), part.targets.split(ROWS_AT_ONCE))
        ]
        return joined(pieces)

    def deliver(self, result: Logprobs[np.ndarray], requests: Requests) -> None:
        """Brings the result of the oldest step in flight to the requests that asked for it."""
        row = 0
        for asked in self.asked.popleft():
            requests.take_prompt_logprobs(asked.seq, asked.position, asked.count, row, result)
            row += asked.count
