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
from nanovllm.layers.edits import edit

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
    if not len(batch.temperature):
        return kernels.argmax(logits)
    threshold = None
    if len(batch.filter_at):
        at = batch.filter_at
        threshold = torch.full_like(batch.temperature, float("-inf"))
        threshold[at] = filter_threshold(logits[at], batch.temperature[at], batch.top_k, batch.top_p, batch.min_p)
    return kernels.draw(logits, batch.temperature, batch.uniform, threshold)


def filter_threshold(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[F] float32: the least logit that min-p, top-k and top-p, in this order, leave in each row of logits [F, V].

    min-p keeps p >= min_p * max(p), top-k the k largest, top-p the smallest set whose share of what the other two left
    reaches top_p. Ties with the last one kept are kept. temperature [F] > 0, top_k 1..V.
    """
    if logits.is_cuda and kernels.gpu():
        return kernels.gpu().filter_threshold(logits, temperature, top_k, top_p, min_p)
    logits, vocab_size = kernels.without_infinities(logits), logits.shape[1]
    floor = logits.amax(-1, keepdim=True) + (temperature * min_p.log())[:, None]
    logits = logits.masked_fill(logits < floor, float("-inf"))
    limited = top_k[top_k < vocab_size]
    candidates = min(vocab_size, max(NUCLEUS_CANDIDATES, int(limited.max()) if len(limited) else 0))
    top = logits.topk(candidates).values
    kth = top.gather(1, (top_k.long().clamp(max=candidates) - 1)[:, None])
    threshold = torch.where((top_k < vocab_size)[:, None], torch.maximum(kth, floor), floor)
    if (top_p < 1).any():
        threshold = torch.maximum(threshold, nucleus_threshold(logits, top, threshold, temperature[:, None], top_p))
    return threshold.squeeze(1)


def nucleus_threshold(logits: Tensor, top: Tensor, threshold: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """[F, 1]: the smallest logit of the smallest set whose probability reaches top_p (Holtzman et al., 2020).

    `top` are the largest logits in order; what lies below `threshold` is excluded already. Only rows whose nucleus is
    larger than `top` are sorted whole.
    """
    total = (logits.masked_fill(logits < threshold, float("-inf")) / temperature).logsumexp(-1, keepdim=True)

    def smallest(ordered: Tensor, at: Any) -> tuple[Tensor, Tensor]:
        mass = (ordered / temperature[at] - total[at]).exp().cumsum(-1)
        size = (mass < top_p[at, None]).sum(-1, keepdim=True)
        return ordered.gather(1, size.clamp(max=ordered.shape[1] - 1)), size.squeeze(1) >= ordered.shape[1]

    result, unfinished = smallest(top.masked_fill(top < threshold, float("-inf")), slice(None))
    rest = ((top_p < 1) & unfinished).nonzero().squeeze(1)
    if len(rest) and top.shape[1] < logits.shape[1]:
        result[rest] = smallest(logits[rest].sort(-1, descending=True).values, rest)[0]
    return torch.where((top_p < 1)[:, None], result, float("-inf"))


def logprobs(logits: Tensor, tokens: Tensor, k: int) -> Logprobs:
    """Of the model's own distribution, before temperature and filters. logits [L, V], tokens [L]."""
    scores = logits.float().log_softmax(-1)
    chosen = scores.gather(1, tokens.long()[:, None])
    rank = (scores > chosen).sum(-1) + 1
    top = scores.topk(k)
    return Logprobs(chosen.squeeze(1), rank, top.indices, top.values)
