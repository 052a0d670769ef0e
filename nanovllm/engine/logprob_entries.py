"""Logprobs as the user reads them: for each token a dict of token id to `Logprob`, with texts."""

from __future__ import annotations

import numpy as np

from nanovllm.core.request import Request
from nanovllm.core.step import Logprobs
from nanovllm.engine.detokenizer import Detokenizer, TokenPieces
from nanovllm.outputs import Logprob
from nanovllm.sampling_params import SamplingParams

CHARACTER_TOKENS = 4  # a character has at most four bytes, hence tokens


def token_pieces(
    detokenizer: Detokenizer | None, params: SamplingParams, before: list[int]
) -> TokenPieces | None:
    """What token texts after the tokens `before` depend on; None where no text is wanted."""
    if detokenizer is None or not params.detokenize:
        return None
    return TokenPieces(detokenizer, params, before)


def logprob_entry(
    token: int,
    row: int,
    logprobs: Logprobs[np.ndarray],
    k: int,
    detokenizer: Detokenizer | None,
    pieces: TokenPieces | None,
    is_last: bool,
) -> dict[int, Logprob]:
    """The token itself first, then the k most likely tokens, each with its rank.

    is_last: no more tokens follow, so an unfinished character shows now.
    """

    def text_of(other: int) -> str | None:
        if pieces is not None:
            return pieces.other(other)
        return None if detokenizer is None else detokenizer.token_text(other)

    entry = {token: Logprob(float(logprobs.token[row]), int(logprobs.rank[row]), None)}
    top = zip(logprobs.top_ids[row, :k].tolist(), logprobs.top[row, :k].tolist())
    for rank, (top_id, value) in enumerate(top, 1):
        if top_id != token:
            entry[top_id] = Logprob(value, rank, text_of(top_id))
    # The token's own text comes last, because it moves `pieces` on.
    entry[token].decoded_token = pieces.take(token, is_last) if pieces else text_of(token)
    return entry


def add_prompt_logprobs(
    request: Request,
    detokenizer: Detokenizer | None,
    position: int,
    count: int,
    row: int,
    logprobs: Logprobs[np.ndarray],
) -> None:
    """Adds the rows `row:row + count`, which are of the prompt tokens from `position` on."""
    tokens = request.prompt_token_ids
    # A chunk may begin inside a character, so some tokens before it are taken too.
    start = max(position - CHARACTER_TOKENS, 1)
    pieces = token_pieces(detokenizer, request.params, tokens[:start])
    if pieces is not None:
        for token in tokens[start:position]:
            pieces.take(token)
    k = request.params.prompt_logprobs or 0
    assert request.prompt_logprobs is not None
    for i in range(count):
        at = position + i
        is_last = at + 1 == len(tokens)
        entry = logprob_entry(tokens[at], row + i, logprobs, k, detokenizer, pieces, is_last)
        request.prompt_logprobs[at] = entry
