"""A logits processor: a host half packs its part of a step, a device half applies it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.core.ability import SamplingAbility
from nanovllm.core.batch import Part
from nanovllm.core.step import Array
from nanovllm.kernels.choice import compiled

ROWS_AT_ONCE = 256  # rows of logits that are copied; a thousand would take gigabytes


class LogitsProcessor(SamplingAbility):
    """An ability that changes logits before the temperature."""

    @abstractmethod
    def apply(self, logits: Tensor, part: Any, rows: Tensor, last_tokens: Tensor) -> Tensor:
        """logits [K, V] float32 -> the same, changed; may write into them.

        part: what the host half made, as tensors. rows: [K] table rows of the logits.
        last_tokens: [table rows] each row's newest token, which the host may not have
        seen.
        """


@dataclass
class TokenBiases(Part[Array]):
    """E numbers to add, each to one logit."""

    at: Array  # [E] int32 rows of the logits
    ids: Array  # [E] int32 token ids
    values: Array  # [E] float32; -inf bans the token


class BiasProcessor(LogitsProcessor):
    """A processor whose whole effect is to add a number to some logits."""

    def apply(self, logits: Tensor, part: Any, rows: Tensor, last_tokens: Tensor) -> Tensor:
        return biased(logits, part.at, part.ids, part.values)


@compiled("logits", "at", "ids", "values")
def biased(logits: Tensor, at: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Adds values [E] to the tokens ids [E] of rows at [E], in place."""
    return logits.index_put_((at, ids), values, accumulate=True)


def token_biases(entries: list[tuple[int, int, float]]) -> TokenBiases[np.ndarray] | None:
    """(row of the logits, token id, number to add) of each; None where there are none."""
    if not entries:
        return None
    at, ids, values = zip(*entries)
    return TokenBiases(
        at=np.array(at, np.int32),
        ids=np.array(ids, np.int32),
        values=np.array(values, np.float32),
    )


def owners(starts: Tensor, total: int) -> Tensor:
    """[0, 2, 5] -> [0, 0, 1, 1, 1]: the piece that each item of a ragged array belongs
    to.

    total: how many items there are. Without it the host would wait for the device to
    count them.
    """
    pieces = torch.arange(len(starts) - 1, device=starts.device)
    return torch.repeat_interleave(pieces, starts.diff(), output_size=total)
