"""What few requests ask for, and only their steps carry: edits of the logits, and logprobs of prompt tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nanovllm.engine.sequence import Sequence, SequenceTable
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.batch import Batch
    from nanovllm.engine.scheduler import Step


def add_edits(batch: Batch, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, edited: np.ndarray) -> None:
    """What changes logits before the temperature: allowed ids, biases and bans, penalties. `edited` indexes `rows`."""
    allow: list[tuple[int, list[int]]] = []
    bias: list[tuple[int, int, float]] = []
    penalised: list[tuple[int, float, float, float]] = []
    histories: list[np.ndarray] = []
    prompt_lens: list[int] = []
    for at in edited.tolist():
        row, length = int(rows[at]), int(lengths[at])
        seq = table.seqs[row]
        params, tokens = seq.params, table.token_ids[row, :length]
        if params.allowed_token_ids:
            allow.append((at, params.allowed_token_ids))
        bias.extend((at, token, value) for token, value in (params.logit_bias or {}).items())
        bans = [word[-1] for word in seq.bad_words if ends_with(tokens[seq.prompt_len :], word[:-1])]
        if length - seq.prompt_len < params.min_tokens:
            bans.extend(seq.ban_until_min_tokens)
        if params.allowed_token_ids and bans:
            check_one_left(params, bans)
        bias.extend((at, token, -np.inf) for token in bans)
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            penalised.append((at, params.presence_penalty, params.frequency_penalty, params.repetition_penalty))
            histories.append(tokens)
            prompt_lens.append(seq.prompt_len)
    if allow:
        batch.allow_at = np.array([at for at, _ in allow], np.int32)
        batch.allow_start = np.cumsum([0] + [len(ids) for _, ids in allow], dtype=np.int32)
        batch.allow_ids = np.concatenate([np.array(ids, np.int32) for _, ids in allow])
    if bias:
        ats, ids, values = zip(*bias)
        batch.bias_at, batch.bias_ids = np.array(ats, np.int32), np.array(ids, np.int32)
        batch.bias_values = np.array(values, np.float32)
    if penalised:
        ats, *penalties = zip(*penalised)
        batch.penalty_at = np.array(ats, np.int32)
        batch.presence, batch.frequency, batch.repetition = (np.array(p, np.float32) for p in penalties)
        batch.history_start = np.cumsum([0] + [len(h) for h in histories], dtype=np.int32)
        batch.history_prompt = np.array(prompt_lens, np.int32)
        batch.history = np.concatenate(histories)


def check_one_left(params: SamplingParams, bans: list[int]) -> None:
    """Raises ValueError where bad words of several tokens have come to ban all that is allowed."""
    banned = {token for token, bias in (params.logit_bias or {}).items() if bias == -np.inf}.union(bans)
    if banned.issuperset(params.allowed_token_ids or ()):
        raise ValueError(
            f"bad_words={params.bad_words} and min_tokens={params.min_tokens} leave none of allowed_token_ids="
            f"{str(params.allowed_token_ids)[:80]} after the tokens so far; allow one more, or ban less"
        )


def ends_with(tokens: np.ndarray, suffix: tuple[int, ...]) -> bool:
    return len(tokens) >= len(suffix) and tokens[len(tokens) - len(suffix) :].tolist() == list(suffix)


def add_prompt_logprobs(batch: Batch, table: SequenceTable, step: Step) -> list[tuple[Sequence, int, int]]:
    """Asks for the logprobs of prompt tokens that this step's queries predict.

    Returns (sequence, first position predicted, count) for each that gets some, in the order of the answer.
    """
    asked: list[tuple[Sequence, int, int]] = []
    at: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for i in np.flatnonzero(table.num_prompt_logprobs[step.rows] >= 0):
        row, start = step.rows[i], int(step.starts[i])
        seq = table.seqs[row]
        stop = min(int(step.ends[i]), seq.prompt_len - 1)
        if start < stop:
            asked.append((seq, start + 1, stop - start))
            at.append(np.arange(stop - start, dtype=np.int32) + batch.query_start[i])
            targets.append(table.token_ids[row, start + 1 : stop + 1])
            batch.sizes[4] = max(batch.sizes[4], table.num_prompt_logprobs[row])
    if asked:
        batch.prompt_at, batch.prompt_targets = np.concatenate(at), np.concatenate(targets)
    return asked
