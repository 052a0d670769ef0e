"""`min_tokens`: EOS and stop tokens are banned until that many tokens are generated."""

from __future__ import annotations

import numpy as np

from nanovllm.core.ability import ModelFacts
from nanovllm.core.sequence import Sequence, SequenceTable
from nanovllm.sampling.base import BiasProcessor, TokenBiases, token_biases
from nanovllm.sampling_params import SamplingParams

NAME = "min_tokens"


class MinTokens(BiasProcessor):
    name = NAME

    def prepare(self, params: SamplingParams, facts: ModelFacts) -> list[int] | None:
        """The tokens to ban. vLLM bans EOS with `ignore_eos` too."""
        if not params.min_tokens:
            return None
        ends = facts.eos_token_ids.union(params.stop_token_ids or ())
        return sorted(token for token in ends if token < facts.vocab_size)

    def part(
        self, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, users: np.ndarray
    ) -> TokenBiases[np.ndarray] | None:
        entries: list[tuple[int, int, float]] = []
        for i in users.tolist():
            seq = table.seqs[int(rows[i])]
            banned = ends_banned_now(seq, int(lengths[i]) - seq.prompt_len)
            entries += [(i, token, -np.inf) for token in banned]
        return token_biases(entries)


def ends_banned_now(seq: Sequence, num_generated: int) -> list[int]:
    """The end tokens that a sequence must not sample after `num_generated` tokens."""
    ends = seq.prepared.get(NAME)
    if not isinstance(ends, list) or num_generated >= seq.params.min_tokens:
        return []
    return ends
