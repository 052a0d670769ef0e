"""`bad_words`: strings that are not generated. After its other tokens, the last one is banned."""

from __future__ import annotations

import numpy as np

from nanovllm.core.ability import ModelFacts
from nanovllm.core.sequence import Sequence, SequenceTable
from nanovllm.errors import ValidationError
from nanovllm.sampling.base import BiasProcessor, TokenBiases, token_biases
from nanovllm.sampling.min_tokens import ends_banned_now
from nanovllm.sampling_params import SamplingParams

Word = tuple[int, ...]  # token ids


class BadWords(BiasProcessor):
    name = "bad_words"

    def prepare(self, params: SamplingParams, facts: ModelFacts) -> list[Word] | None:
        """Each word as it is tokenised as written, at the start of a text, and after a
        space.

        A form that holds an id without a row in the model can never be generated.
        """
        found: set[Word] = set()
        for word in params.bad_words or []:
            bare = word.lstrip()
            for form in {word, bare, " " + bare} if bare else {word}:
                ids = tuple(facts.encode(form))
                if ids and max(ids) < facts.vocab_size:
                    found.add(ids)
        return sorted(found) or None

    def needs_previous_token(self, prepared: object) -> bool:
        return any(len(word) > 1 for word in words_of(prepared))

    def part(
        self, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, users: np.ndarray
    ) -> TokenBiases[np.ndarray] | None:
        entries: list[tuple[int, int, float]] = []
        for i in users.tolist():
            seq = table.seqs[int(rows[i])]
            answer = table.token_ids[rows[i], seq.prompt_len : lengths[i]]
            banned = [
                word[-1]
                for word in words_of(seq.prepared[self.name])
                if ends_with(answer, word[:-1])
            ]
            if banned and seq.params.allowed_token_ids:
                check_one_is_left(seq, banned, len(answer))
            entries += [(i, token, -np.inf) for token in banned]
        return token_biases(entries)


def words_of(prepared: object) -> list[Word]:
    assert isinstance(prepared, list)
    return prepared


def ends_with(tokens: np.ndarray, suffix: Word) -> bool:
    return len(tokens) >= len(suffix) and tokens[len(tokens) - len(suffix) :].tolist() == list(
        suffix
    )


def check_one_is_left(seq: Sequence, banned: list[int], num_generated: int) -> None:
    """Raises ValidationError if the bad words now ban every token that the request allows."""
    biases = (seq.params.logit_bias or {}).items()
    all_banned = {*banned, *ends_banned_now(seq, num_generated)}
    all_banned |= {token for token, bias in biases if bias == -np.inf}
    allowed = seq.params.allowed_token_ids or []
    if all_banned.issuperset(allowed):
        raise ValidationError(
            f"bad_words={seq.params.bad_words} leave none of allowed_token_ids={str(allowed)[:80]} "
            f"after {num_generated} generated tokens; allow one more token, or ban fewer words"
        )
