"""`allowed_token_ids`: all other tokens are banned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.core.ability import ModelFacts
from nanovllm.core.batch import Part
from nanovllm.core.sequence import SequenceTable
from nanovllm.core.step import Array
from nanovllm.kernels.choice import compiled
from nanovllm.sampling.base import ROWS_AT_ONCE, LogitsProcessor, owners
from nanovllm.sampling_params import SamplingParams


@dataclass
class AllowedIdsPart(Part[Array]):
    """Row `at[i]` of the logits keeps the tokens `ids[start[i]:start[i + 1]]`."""

    at: Array  # [A] int32
    start: Array  # [A + 1] int32
    ids: Array  # int32


class AllowedIds(LogitsProcessor):
    name = "allowed_ids"

    def prepare(self, params: SamplingParams, facts: ModelFacts) -> object | None:
        return params.allowed_token_ids

    def part(
        self, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, users: np.ndarray
    ) -> AllowedIdsPart[np.ndarray]:
        allowed = [table.seqs[row].params.allowed_token_ids or [] for row in rows[users].tolist()]
        return AllowedIdsPart(
            at=users.astype(np.int32),
            start=np.cumsum([0, *map(len, allowed)], dtype=np.int32),
            ids=np.array([token for ids in allowed for token in ids], np.int32),
        )

    def apply(
        self, logits: Tensor, part: AllowedIdsPart[Tensor], rows: Tensor, last_tokens: Tensor
    ) -> Tensor:
        shape = (len(part.at), logits.shape[1])
        banned = torch.ones(shape, dtype=torch.bool, device=logits.device)
        # A tensor, because the host would wait while a Python False is copied to the
        # device.
        banned[owners(part.start, len(part.ids)), part.ids] = banned.new_zeros(())
        for at, ban in zip(part.at.split(ROWS_AT_ONCE), banned.split(ROWS_AT_ONCE)):
            logits[at] = without(logits[at], ban)
        return logits


@compiled("logits", "banned")
def without(logits: Tensor, banned: Tensor) -> Tensor:
    """logits [A, V], -inf where `banned` [A, V] is true."""
    return logits.masked_fill(banned, float("-inf"))
