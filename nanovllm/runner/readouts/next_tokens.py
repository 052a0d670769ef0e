"""The readout of every step: a new token for each sequence whose known tokens are all computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from nanovllm.core.batch import Batch
from nanovllm.core.step import Logprobs
from nanovllm.models.base import LanguageModel
from nanovllm.parallel import TensorParallel
from nanovllm.runner.readouts.base import Readout
from nanovllm.sampling.base import ROWS_AT_ONCE
from nanovllm.sampling.logprobs import LogprobsPart, joined, logprobs, ranked
from nanovllm.sampling.sampler import Processed, errors_of, process
from nanovllm.weights.lora import LoRAWeight


@dataclass
class Sampled:
    """The sampled tokens, and the logprobs of the L rows that ask for them."""

    tokens: Tensor  # [K] int64
    logprobs: Logprobs[Tensor] | None = None
    errors: dict[int, Exception] = field(default_factory=dict)  # token -> its request's error


def logits_at(model: LanguageModel, hidden: Tensor, at: Tensor) -> Tensor:
    """Logits [K, vocabulary] of the tokens `at` [K] of a step."""
    head = model.head.storage
    if isinstance(head, LoRAWeight) and head.linear_changes:
        with head.rows.picked(at):
            return model.logits(hidden[at])
    return model.logits(hidden[at])


class NextTokens(Readout[Sampled]):
    """`last_tokens` [table rows + 1] holds each row's newest token; the last entry is padding's.

    logprobs_mode: one of config.LOGPROBS_MODES.
    """

    name = "next_tokens"

    def __init__(
        self, tp: TensorParallel, last_tokens: Tensor, logprobs_mode: str = "raw_logprobs"
    ) -> None:
        self.tp = tp
        self.last_tokens = last_tokens
        self.is_raw = logprobs_mode.startswith("raw")
        self.is_log = logprobs_mode.endswith("logprobs")

    def read(self, model: LanguageModel, hidden: Tensor, batch: Batch[Tensor]) -> Sampled:
        logits = logits_at(model, hidden, batch.sample.at)
        part = batch.parts.get("logprobs")
        if not isinstance(part, LogprobsPart):
            return Sampled(self.sample(logits, batch), errors=errors_of(batch))
        # A copy, because the sampler may overwrite the logits.
        raw = logits[part.at] if self.is_raw else None
        processed = process(logits, batch, self.last_tokens)
        tokens = self.draw(processed, batch)
        return Sampled(tokens, self.scores(raw, processed, tokens, part), errors_of(batch))

    def scores(
        self,
        raw: Tensor | None,
        processed: Processed,
        tokens: Tensor,
        part: LogprobsPart[Tensor],
    ) -> Logprobs[Tensor]:
        """The logprobs or logits of the L rows of `part`. raw: the model's logits [L, V]."""
        score = logprobs if self.is_log else ranked
        pieces = []
        for start in range(0, len(part.at), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            at = part.at[rows]
            shown = processed.scaled(at) if raw is None else raw[rows]
            pieces.append(score(shown, tokens[at], part.k))
        return joined(pieces)

    def sample(self, logits: Tensor, batch: Batch[Tensor]) -> Tensor:
        """logits [K, V] -> tokens [K]. Rank 0 alone samples, and tells the other ranks."""
        is_first = self.tp.rank == 0
        processed = process(logits, batch, self.last_tokens) if is_first else None
        return self.draw(processed, batch)

    def draw(self, processed: Processed | None, batch: Batch[Tensor]) -> Tensor:
        """The tokens [K]. Other ranks get them from rank 0."""
        if self.tp.rank == 0 and processed is not None:
            tokens = processed.draw(batch.sample.uniform)
        else:
            tokens = batch.sample.at.long()
        self.tp.broadcast(tokens)
        self.last_tokens[batch.sample.rows] = tokens
        return tokens
