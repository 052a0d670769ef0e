"""min-p, top-k and top-p: together one threshold a row, the least logit that may be drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.core.ability import ModelFacts, SamplingAbility
from nanovllm.core.batch import Part
from nanovllm.core.sequence import Columns, SequenceTable
from nanovllm.core.step import Array
from nanovllm.sampling_params import SamplingParams

NUCLEUS_CANDIDATES = 1024  # top-p reads the most likely tokens before it sorts a whole row


@dataclass
class FiltersPart(Part[Array]):
    """The F rows that are filtered; greedy rows never are.

    In a recorded step: all rows. `FILTERS_OFF` has the numbers of rows without a filter.
    """

    at: Array  # [F] int32 rows of the logits, in order
    top_k: Array  # [F] int32; at most 0, or the vocabulary size: off
    top_p: Array  # [F] float32
    min_p: Array  # [F] float32


FILTERS_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


class Filters(SamplingAbility):
    """The ability to limit draws by min-p, top-k and top-p."""

    name = "filters"
    columns = {"top_k": np.int32, "top_p": np.float32, "min_p": np.float32}

    def prepare(self, params: SamplingParams, facts: ModelFacts) -> Columns | None:
        if params.top_k <= 0 and params.top_p == 1 and params.min_p == 0:
            return None
        top_k = params.top_k if params.top_k > 0 else facts.vocab_size
        return Columns(top_k=top_k, top_p=params.top_p, min_p=params.min_p)

    def part(
        self, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, users: np.ndarray
    ) -> FiltersPart[np.ndarray]:
        mine = rows[users]
        return FiltersPart(
            at=users.astype(np.int32),
            top_k=table.columns["top_k"][mine],
            top_p=table.columns["top_p"][mine],
            min_p=table.columns["min_p"][mine],
        )

    def without_min_p(
        self, scaled: Tensor, part: FiltersPart[Tensor]
    ) -> tuple[Tensor, FiltersPart[Tensor]]:
        """Applies min-p alone to logits [K, V] after the temperature.

        Returns the logits, and the part that is left to apply.
        """
        mine = scaled[part.at]
        floor = mine.amax(-1) + part.min_p.log()
        scaled[part.at] = mine.masked_fill(mine < floor[:, None], float("-inf"))
        return scaled, replace(part, min_p=torch.zeros_like(part.min_p))

    def threshold(self, logits: Tensor, temperature: Tensor, part: FiltersPart[Tensor]) -> Tensor:
        """[K] float32: the least logit that may be drawn in each row; -inf where all may."""
        if len(part.at) == len(logits):
            return filter_threshold(logits, temperature, part.top_k, part.top_p, part.min_p)
        threshold = torch.full_like(temperature, float("-inf"))
        threshold[part.at] = filter_threshold(
            logits[part.at],
            temperature[part.at],
            part.top_k,
            part.top_p,
            part.min_p,
        )
        return threshold


def can_record_filters(logits: Tensor) -> bool:
    """Whether a CUDA graph can hold `filter_threshold` of these logits.

    The plain definition waits for the device: it looks for the largest k, and for rows
    whose nucleus is large.
    """
    return kernels.triton_for(logits, "filter_threshold") is not None


def filter_threshold(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """The least logit that min-p, top-k and top-p leave in a row: [F, V] -> [F] float32.

    They apply in this order. min-p keeps p >= min_p * max(p). top-k keeps the k largest.
    top-p keeps the smallest set whose share of the rest reaches top_p. Ties with the last
    token kept are kept. A row without a filter (`FILTERS_OFF`, or k of at least V) gets
    -inf. temperature [F] is above 0 in other rows.
    """
    triton = kernels.triton_for(logits, "filter_threshold")
    if triton is not None:
        return triton.filter_threshold(logits, temperature, top_k, top_p, min_p)
    logits = kernels.without_infinities(logits)
    vocab_size = logits.shape[1]
    limited = (top_k > 0) & (top_k < vocab_size)
    is_off = ~limited & (top_p >= 1) & (min_p <= 0)
    temperature = temperature[:, None]  # [F, 1]
    distance = temperature * min_p.log()[:, None]
    floor = logits.amax(-1, keepdim=True) + distance  # [F, 1]
    logits = logits.masked_fill(logits < floor, float("-inf"))

    limits = top_k[limited]
    largest_k = 0
    if len(limits):
        largest_k = int(limits.max())
    candidates = min(vocab_size, max(NUCLEUS_CANDIDATES, largest_k))
    top = logits.topk(candidates).values  # [F, candidates]
    last = top_k.long().clamp(1, candidates) - 1
    kth = top.gather(1, last[:, None])  # [F, 1]
    threshold = torch.where(limited[:, None], torch.maximum(kth, floor), floor)

    if (top_p < 1).any():
        nucleus = nucleus_threshold(logits, top, threshold, temperature, top_p[:, None])
        threshold = torch.maximum(threshold, nucleus)
    return threshold.squeeze(1).masked_fill(is_off, float("-inf"))


def nucleus_threshold(
    logits: Tensor,
    top: Tensor,
    threshold: Tensor,
    temperature: Tensor,
    top_p: Tensor,
) -> Tensor:
    """[F, 1]: the least logit of the smallest set whose probability reaches top_p [F, 1].

    (Holtzman et al., 2020.) `top` [F, n] are the largest logits in order. Logits below
    `threshold` [F, 1] are excluded already. temperature is [F, 1]. Only rows whose
    nucleus is larger than `top` are sorted whole.
    """
    kept = logits.masked_fill(logits < threshold, float("-inf"))
    total = (kept / temperature).logsumexp(-1, keepdim=True)

    def last_of_nucleus(ordered: Tensor, at: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Of rows `at`: the last logit of the nucleus, and whether `ordered` is too short."""
        share = (ordered / temperature[at] - total[at]).exp().cumsum(-1)
        size = (share < top_p[at]).sum(-1, keepdim=True)
        width = ordered.shape[1]
        last = size.clamp(max=width - 1)
        return ordered.gather(1, last), size >= width

    top = top.masked_fill(top < threshold, float("-inf"))
    result, unfinished = last_of_nucleus(top, slice(None))
    is_on = top_p < 1
    rest = (is_on & unfinished).squeeze(1).nonzero().squeeze(1)
    if len(rest) and top.shape[1] < logits.shape[1]:
        ordered = logits[rest].sort(-1, descending=True).values
        result[rest], _ = last_of_nucleus(ordered, rest)
    return torch.where(is_on, result, float("-inf"))
