"""Log-probabilities of sampled and prompt tokens, or their logits: `logprobs_mode`.

Raw modes are of the model's own distribution. Processed modes are of the distribution
that tokens are drawn from: after logits processors, temperature and filters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanovllm.core.ability import ModelFacts, SamplingAbility
from nanovllm.core.batch import Part
from nanovllm.core.sequence import Columns, SequenceTable
from nanovllm.core.step import Array, Logprobs
from nanovllm.sampling_params import SamplingParams


@dataclass
class LogprobsPart(Part[Array]):
    """The L sampled rows whose requests ask for logprobs."""

    at: Array  # [L] int32 rows of the logits
    k: int  # the most likely tokens that the most demanding of them asks for


class SampledLogprobs(SamplingAbility):
    name = "logprobs"
    columns = {"num_logprobs": np.int32}

    def prepare(self, params: SamplingParams, facts: ModelFacts) -> Columns | None:
        return None if params.logprobs is None else Columns(num_logprobs=params.logprobs)

    def part(
        self, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, users: np.ndarray
    ) -> LogprobsPart[np.ndarray]:
        k = int(table.columns["num_logprobs"][rows[users]].max())
        return LogprobsPart(users.astype(np.int32), k)


def logprobs(logits: Tensor, tokens: Tensor, k: int) -> Logprobs[Tensor]:
    """logits [L, V] and one token id a row [L] -> its logprob and rank, and the k most likely."""
    return ranked(logits.float().log_softmax(-1), tokens, k)


def ranked(scores: Tensor, tokens: Tensor, k: int) -> Logprobs[Tensor]:
    """scores [L, V] and one token id a row [L] -> its score and rank, and the k largest."""
    chosen = scores.gather(1, tokens.long()[:, None])
    top = scores.topk(k)
    return Logprobs(
        token=chosen.squeeze(1),
        rank=(scores > chosen).sum(-1) + 1,
        top_ids=top.indices,
        top=top.values,
    )
