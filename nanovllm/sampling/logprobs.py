"""Log-probabilities of sampled and prompt tokens, or their logits: `logprobs_mode`.

Raw modes are of the model's own distribution. Processed modes are of the distribution
that tokens are drawn from: after logits processors, temperature and filters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.core.ability import ModelFacts, SamplingAbility
from nanovllm.core.batch import Part
from nanovllm.core.sequence import Columns, SequenceTable
from nanovllm.core.step import Array, Logprobs
from nanovllm.kernels.choice import compiled
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
    return ranked(log_softmax(logits), tokens, k)


@compiled("logits")
def log_softmax(logits: Tensor) -> Tensor:
    """[L, V] -> [L, V] float32."""
    return logits.float().log_softmax(-1)


def ranked(scores: Tensor, tokens: Tensor, k: int) -> Logprobs[Tensor]:
    """scores [L, V] and one token id a row [L] -> its score and rank, and the k largest."""
    scores = scores.float()
    token, rank = score_and_rank(scores, tokens)
    top = scores.topk(k)
    return Logprobs(token=token, rank=rank, top_ids=top.indices, top=top.values)


@compiled("scores", "tokens")
def score_and_rank(scores: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """scores [L, V] and one token id a row [L] -> its score and rank [L]. Ranks begin at 1."""
    chosen = scores.gather(1, tokens.long()[:, None])
    return chosen.squeeze(1), (scores > chosen).sum(-1) + 1


def joined(pieces: list[Logprobs[Tensor]]) -> Logprobs[Tensor]:
    """The rows of all pieces, one piece after the other."""
    if len(pieces) == 1:
        return pieces[0]
    return Logprobs(
        token=torch.cat([piece.token for piece in pieces]),
        rank=torch.cat([piece.rank for piece in pieces]),
        top_ids=torch.cat([piece.top_ids for piece in pieces]),
        top=torch.cat([piece.top for piece in pieces]),
    )
