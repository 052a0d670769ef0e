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
from nanovllm.kernels.choice import compiled
from nanovllm.sampling.base import ROWS_AT_ONCE, LogitsProcessor, owners
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
        newest = last_tokens[rows[part.at]]  # [P]
        owner = owners(part.history_start, len(part.history))
        starts = part.history_start[:-1]
        ids, is_generated = texts(part.history, owner, newest, starts, part.prompt_lens)
        for start in range(0, len(part.at), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            at = part.at[some]
            # Tokens of texts that are not among these go to one row more, which is unused.
            place = owner - start
            place = torch.where((place >= 0) & (place < len(at)), place, len(at))
            shape = (len(at) + 1, logits.shape[1])
            seen = torch.zeros(shape, dtype=torch.bool, device=logits.device)
            # A tensor, because the host would wait while a Python True is copied to the device.
            seen[place, ids] = seen.new_ones(())
            counts = torch.zeros(shape, device=logits.device)
            counts.index_put_((place, ids), is_generated, accumulate=True)
            penalties = (part.presence[some], part.frequency[some], part.repetition[some])
            logits[at] = penalised(logits[at], seen[:-1], counts[:-1], *penalties)
        return logits


@compiled("history", "owner", "newest", "starts", "prompt_lens")
def texts(
    history: Tensor, owner: Tensor, newest: Tensor, starts: Tensor, prompt_lens: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids of all P texts [N] int64, and 1.0 where a token is generated [N].

    history [N]: -1 stands for the text's newest token. owner [N]: the text of each token.
    newest, starts and prompt_lens [P]: each text's newest token, its first place in
    `history`, and the length of its prompt.
    """
    ids = torch.where(history < 0, newest[owner], history)
    place = torch.arange(len(ids), device=ids.device) - starts[owner]
    return ids, (place >= prompt_lens[owner]).float()


@compiled("x", "seen", "counts", "presence", "frequency", "repetition")
def penalised(
    x: Tensor,
    seen: Tensor,
    counts: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> Tensor:
    """logits [P, V] -> [P, V].

    seen [P, V]: whether the text has the token. counts [P, V]: how often the token was
    generated. The penalties are [P].
    """
    repetition = repetition[:, None]
    repeated = torch.where(x > 0, x / repetition, x * repetition)
    x = torch.where(seen, repeated, x)
    x = x - frequency[:, None] * counts
    return x - presence[:, None] * (counts > 0)
