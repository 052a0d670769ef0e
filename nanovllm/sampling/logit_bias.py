"""`logit_bias`: numbers that are added to the logits of some tokens."""

from __future__ import annotations

import numpy as np

from nanovllm.core.ability import ModelFacts
from nanovllm.core.sequence import SequenceTable
from nanovllm.sampling.base import BiasProcessor, TokenBiases, token_biases
from nanovllm.sampling_params import SamplingParams


class LogitBias(BiasProcessor):
    name = "logit_bias"

    def prepare(self, params: SamplingParams, facts: ModelFacts) -> object | None:
        return params.logit_bias or None

    def part(
        self, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, users: np.ndarray
    ) -> TokenBiases[np.ndarray] | None:
        entries = [
            (i, token, bias)
            for i in users.tolist()
            for token, bias in (table.seqs[int(rows[i])].params.logit_bias or {}).items()
        ]
        return token_biases(entries)
