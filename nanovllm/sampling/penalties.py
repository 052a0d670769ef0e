"""Presence, frequency and repetition penalties: tokens that a text already has become
less likely.

Presence and frequency penalties are OpenAI's: they count generated tokens. The repetition
penalty is that of Keskar et al., 2019 (CTRL), and looks at the prompt too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.core.ability import ModelFacts
from nanovllm.core.batch import Part
from nanovllm.core.sequence import Columns, SequenceTable
from nanovllm.core.step import Array
from nanovllm.sampling.base import LogitsProcessor, owners
from nanovllm.sampling_params import SamplingParams


@dataclass
class PenaltiesPart(Part[Array]):
    """P rows and the texts that they have so far."""

    at: Array  # [P] int32 rows of the logits
    presence: Array  # [P] float32
    frequency: Array  # [P] float32
    repetition: Array  # [P] float32
    history: Array  # int32 token ids of all P texts; -1: not on the host yet
    history_start: Array  # [P + 1] int32
    prompt_lens: Array  # [P] int32


class Penalties(LogitsProcessor):
    name = "penalties"
    columns = {
        "presence_penalty": np.float32,
        "frequency_penalty": np.float32,
        "repetition_penalty": np.float32,
    }

    def prepare(self, params: SamplingParams, facts: ModelFacts) -> Columns | None:
        is_neutral = params.presence_penalty == 0 and params.frequency_penalty == 0
        if is_neutral and params.repetition_penalty == 1:
            return None
        return Columns({name: getattr(params, name) for name in self.columns})

    def part(
        self, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, users: np.ndarray
    ) -> PenaltiesPart[np.ndarray]:
        mine = rows[users]
        histories = [
            table.token_ids[row, :length]
            for row, length in zip(mine.tolist(), lengths[users].tolist())
        ]
        prompt_lens = [table.seqs[row].prompt_len for row in mine.tolist()]
        return PenaltiesPart(
            at=users.astype(np.int32),
            presence=table.columns["presence_penalty"][mine],
            frequency=table.columns["frequency_penalty"][mine],
            repetition=table.columns["repetition_penalty"][mine],
            history=np.concatenate(histories),
            history_start=np.cumsum([0, *map(len, histories)], dtype=np.int32),
            prompt_lens=np.array(prompt_lens, np.int32),
        )

    def apply(
        self, logits: Tensor, part: PenaltiesPart[Tensor], rows: Tensor, last_tokens: Tensor
    ) -> Tensor:
        owner = owners(part.history_start, len(part.history))
        newest = last_tokens[rows[part.at][owner]].to(part.history.dtype)
        ids = torch.where(part.history < 0, newest, part.history)
        place = torch.arange(len(ids), device=ids.device) - part.history_start[owner]
        is_generated = (place >= part.prompt_lens[owner]).float()

        where = (owner, ids.long())
        zeros = torch.zeros(len(part.at), logits.shape[1], device=logits.device)
        seen = zeros.index_put(where, torch.ones_like(is_generated), accumulate=True) > 0
        counts = zeros.index_put(where, is_generated, accumulate=True)

        x = logits[part.at]
        repetition = part.repetition[:, None]
        repeated = torch.where(x > 0, x / repetition, x * repetition)
        x = torch.where(seen, repeated, x)
        x = x - part.frequency[:, None] * counts
        x = x - part.presence[:, None] * (counts > 0)
        logits[part.at] = x
        return logits
