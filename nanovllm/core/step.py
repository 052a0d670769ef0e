"""A step's plan and its results, between scheduler, runner and output processor. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

Array = TypeVar("Array")  # numpy's on the host, torch's on the device


@dataclass
class Step:
    """A step's plan: the sequence in table row `rows[i]` computes tokens `starts[i]:ends[i]`."""

    rows: np.ndarray  # [S]
    starts: np.ndarray  # [S]
    ends: np.ndarray  # [S]
    sampled: np.ndarray  # [K] indices into `rows` of the sequences that get a new token
    seq_ids: (
        np.ndarray
    )  # [K] who gets it: a row may belong to another sequence when the token arrives


@dataclass
class Logprobs(Generic[Array]):
    """Log-probabilities of one token a row, and of the k most likely tokens."""

    token: Array  # [L] float32: of the row's own token
    rank: Array  # [L] int64: of the row's own token, from 1
    top_ids: Array  # [L, k] int64, the most likely first
    top: Array  # [L, k] float32


@dataclass
class StepResult:
    """What a step computed, on the host."""

    tokens: np.ndarray  # [K] int64
    logprobs: Logprobs[np.ndarray] | None  # [L] rows: of the sampled tokens that ask for them
    logprob_rows: np.ndarray  # [L] which sampled token each row of `logprobs` belongs to
    readouts: dict[str, Logprobs[np.ndarray]]  # name of a readout -> its result
    # Sampled token -> the error of its request's own code. The token means nothing then.
    errors: dict[int, Exception] = field(default_factory=dict)
