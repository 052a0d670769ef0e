"""A readout is what is made of a step's hidden states: next tokens, prompt logprobs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from nanovllm.core.batch import Batch
from nanovllm.core.sequence import Sequence
from nanovllm.core.step import Logprobs
from nanovllm.models.base import LanguageModel

Result = TypeVar("Result")  # tensors


class Readout(ABC, Generic[Result]):
    """The device half. It is stateless, or its state lives on the device."""

    name: str

    @abstractmethod
    def read(self, model: LanguageModel, hidden: Tensor, batch: Batch[Tensor]) -> Result:
        """hidden: [T, hidden_size] of the step's tokens. Returns tensors, and waits for nothing."""


class Requests(Protocol):
    """Where the host half of a readout delivers its results."""

    def take_prompt_logprobs(
        self, seq: Sequence, position: int, count: int, row: int, logprobs: Logprobs[np.ndarray]
    ) -> None: ...
