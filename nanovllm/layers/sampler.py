"""One token a row of logits, a pure function of (logits, parameters, uniform number); also log-probabilities.

It sees a `Batch` of tensors and knows neither sequences nor where the numbers come from. Each part runs only for the
rows that ask for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.engine.batch import Batch

NUCLEUS_CANDIDATES = 1024  # top-p looks at so many of the most likely tokens before it sorts a whole row


class Logprobs(NamedTuple):
    """Of each row: the log-probability and rank (from 1) of its token, and the most likely tokens in order.

    Tensors on the device, numpy arrays once they are collected.
    """

    token: Any  # [L] float32
    rank: Any  # [L] int64
    top_ids: Any  # [L, k]
    top: Any  # [L, k] float32


def sample(logits: Tensor, batch: Batch, last_tokens: Tensor) -> Tensor:
    """logits [K, V] of any float type -> token ids [K] int64.

    The order is vLLM's: allowed ids, bans and biases, penalties, temperature, min-p, top-k, top-p. `last_tokens` [rows]
    holds each row's latest token, for histories whose end the host has not seen. May overwrite the logits.
    """
    if len(batch.allow_at) or len(batch.bias_at) or len(batch.penalty_at):
        logits = edit(logits.float(), batch, last_tokens)
    if not len(batch.random_at):
        return logits.argmax(-1)
    if len(batch.random_at) == len(logits):
        drawn, tokens = logits, None
    else:
        drawn, tokens = logits[batch.random_at], logits.argmax(-1)
    if len(batch.filter_at):
        drawn = drawn.float()
        at = batch.filter_at
        drawn[at] = drawn[at].masked_fill(unlikely(drawn[at] / batch.temperature[at, None], batch), float("-inf"))
    draws = kernels.draw(drawn, batch.temperature, batch.uniform)
    if tokens is None:
        return draws
    tokens[batch.random_at] = draws
    return tokens


def edit(logits: Tensor, batch: Batch, last_tokens: Tensor) -> Tensor:
    """Allowed ids, biases, bans, and penalties (Keskar et al., 2019; presence and frequency as OpenAI defines them)."""
    vocab_size = logits.shape[1]
    if len(batch.allow_at):
        banned = torch.ones(len(batch.allow_at), vocab_size, dtype=torch.bool, device=logits.device)
        banned[owners(batch.allow_start), batch.allow_ids] = False
        logits[batch.allow_at] = logits[batch.allow_at].masked_fill(banned, float("-inf"))
    if len(batch.bias_at):
        logits.index_put_((batch.bias_at, batch.bias_ids), batch.bias_values, accumulate=True)
    if len(batch.penalty_at):
        owner = owners(batch.history_start)
        row = batch.sample_rows[batch.penalty_at]
        ids = torch.where(batch.history < 0, last_tokens[row[owner]].to(batch.history.dtype), batch.history)
        place = torch.arange(len(ids), device=ids.device) - batch.history_start[owner]
        is_output = (place >= batch.history_prompt[owner]).float()
        at = (owner, ids.long())
        zeros = torch.zeros(len(batch.penalty_at), vocab_size, device=logits.device)
        seen = zeros.index_put(at, torch.ones_like(is_output), accumulate=True) > 0
        counts = zeros.index_put(at, is_output, accumulate=True)
        x = logits[batch.penalty_at]
        repetition = batch.repetition[:, None]
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x = x - batch.frequency[:, None] * counts - batch.presence[:, None] * (counts > 0)
        logits[batch.penalty_at] = x
    return logits


def owners(starts: Tensor) -> Tensor:
    """[0, 2, 5] -> [0, 0, 1, 1, 1]: which piece each item of a ragged array belongs to."""
    return torch.repeat_interleave(torch.arange(len(starts) - 1, device=starts.device), starts.diff())


def unlikely(logits: Tensor, batch: Batch) -> Tensor:
    """What min-p, top-k and top-p exclude, as bool [F, V]; logits [F, V] after the temperature. Ties are kept."""
    vocab_size = logits.shape[1]
    floor = logits.amax(-1, keepdim=True) + batch.min_p.log()[:, None]
    logits = logits.masked_fill(logits < floor, float("-inf"))
    k = batch.top_k.clamp(max=vocab_size).long()
    limited = k[k < vocab_size]
    candidates = min(vocab_size, max(NUCLEUS_CANDIDATES, int(limited.max()) if len(limited) else 0))
    top = logits.topk(candidates).values
    kth = top.gather(1, (k.clamp(max=candidates) - 1)[:, None])
    threshold = torch.where((k < vocab_size)[:, None], torch.maximum(kth, floor), floor)
    if (batch.top_p < 1).any():
        threshold = torch.maximum(threshold, nucleus_threshold(logits, top, threshold, batch.top_p))
    return logits < threshold


def nucleus_threshold(logits: Tensor, top: Tensor, threshold: Tensor, top_p: Tensor) -> Tensor:
    """[F, 1]: the smallest logit of the smallest set whose probability reaches top_p (Holtzman et al., 2020).

    `top` are the largest logits in order; what lies below `threshold` is excluded already. Only rows whose nucleus is
    larger than `top` are sorted whole.
    """
    total = logits.masked_fill(logits < threshold, float("-inf")).logsumexp(-1, keepdim=True)

    def smallest(ordered: Tensor, total: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
        mass = (ordered - total).exp().cumsum(-1)
        size = (mass < top_p[:, None]).sum(-1, keepdim=True)
        return ordered.gather(1, size.clamp(max=ordered.shape[1] - 1)), size.squeeze(1) >= ordered.shape[1]

    result, unfinished = smallest(top.masked_fill(top < threshold, float("-inf")), total, top_p)
    rest = ((top_p < 1) & unfinished).nonzero().squeeze(1)
    if len(rest) and top.shape[1] < logits.shape[1]:
        result[rest] = smallest(logits[rest].sort(-1, descending=True).values, total[rest], top_p[rest])[0]
    return torch.where((top_p < 1)[:, None], result, float("-inf"))


def logprobs(logits: Tensor, tokens: Tensor, k: int) -> Logprobs:
    """Of the model's own distribution, before temperature and filters. logits [L, V], tokens [L]."""
    scores = logits.float().log_softmax(-1)
    chosen = scores.gather(1, tokens.long()[:, None])
    rank = (scores > chosen).sum(-1) + 1
    top = scores.topk(k)
    return Logprobs(chosen.squeeze(1), rank, top.indices, top.values)
