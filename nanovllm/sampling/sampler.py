"""One token a row of logits: a pure function of logits, parameters and a uniform random
number.

The sampler sees tensors. It knows neither sequences nor where the random numbers come
from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.core.ability import SamplingAbility
from nanovllm.core.batch import Batch
from nanovllm.kernels.choice import compiled
from nanovllm.sampling.allowed_ids import AllowedIds
from nanovllm.sampling.bad_words import BadWords
from nanovllm.sampling.base import LogitsProcessor
from nanovllm.sampling.engine_processors import EngineProcessors, EngineProcessorsPart
from nanovllm.sampling.filters import Filters, FiltersPart
from nanovllm.sampling.logit_bias import LogitBias
from nanovllm.sampling.logprobs import SampledLogprobs
from nanovllm.sampling.min_tokens import MinTokens
from nanovllm.sampling.penalties import Penalties
from nanovllm.sampling.request_processors import RequestProcessors, RequestProcessorsPart

ENGINE_PROCESSORS = EngineProcessors()
REQUEST_PROCESSORS = RequestProcessors()
# A logits processor is a file and a line here. They apply in this order, which is vLLM's.
PROCESSORS: list[LogitsProcessor] = [
    AllowedIds(),
    BadWords(),
    MinTokens(),
    LogitBias(),
    ENGINE_PROCESSORS,
    REQUEST_PROCESSORS,
    Penalties(),
]
FILTERS = Filters()


def sampling_abilities() -> list[SamplingAbility]:
    """Everything that concerns sampled tokens and that a request may leave unused."""
    return [*PROCESSORS, FILTERS, SampledLogprobs()]


@dataclass
class Processed:
    """What the tokens of K rows are drawn from."""

    logits: Tensor  # [K, V]
    temperature: Tensor  # [K] float32, 0: greedy; [0] where all are greedy
    threshold: Tensor | None  # [K] float32: the least logit that may be drawn; None: any

    def draw(self, uniform: Tensor) -> Tensor:
        """uniform [K] random numbers in [0, 1) -> token ids [K] int64."""
        if not len(self.temperature):
            return kernels.argmax(self.logits)
        return kernels.draw(self.logits, self.temperature, uniform, self.threshold)

    def scaled(self, at: Tensor) -> Tensor:
        """[L, V] float32: rows `at` after temperature and filters.

        Their softmax is what tokens are drawn from. Greedy rows keep their logits, as if
        the temperature was 1.
        """
        threshold = None if self.threshold is None else self.threshold[at]
        temperature = self.temperature[at] if len(self.temperature) else None
        return scaled(self.logits[at], threshold, temperature)


@compiled("logits", "threshold", "temperature")
def scaled(logits: Tensor, threshold: Tensor | None, temperature: Tensor | None) -> Tensor:
    """logits [L, V] -> float32, -inf below the threshold [L], divided by the temperature [L]."""
    logits = logits.float()
    if threshold is not None:
        logits = logits.masked_fill(logits < threshold[:, None], float("-inf"))
    return logits if temperature is None else logits / divisor(temperature)


def divisor(temperature: Tensor) -> Tensor:
    """[K] -> [K, 1]: what logits are divided by."""
    return temperature.masked_fill(temperature == 0, 1)[:, None]


def process(logits: Tensor, batch: Batch[Tensor], last_tokens: Tensor) -> Processed:
    """logits [K, V] of any float type -> what tokens are drawn from.

    The order is vLLM's: logits processors, temperature, min-p, top-k, top-p.
    `last_tokens` [table rows] holds each row's newest token. The logits may be
    overwritten.
    """
    rows = batch.sample
    for processor in PROCESSORS:
        part = batch.parts.get(processor.name)
        if part is not None:
            logits = processor.apply(logits.float(), part, rows.rows, last_tokens)
    temperature = rows.temperature
    if not len(temperature):
        return Processed(logits, temperature, None)
    filters = batch.parts.get(FILTERS.name)
    user = batch.parts.get(ENGINE_PROCESSORS.name)
    if isinstance(user, EngineProcessorsPart) and user.changes_draws():
        # These processors apply between min-p and top-k.
        scaled = logits.float() / divisor(temperature)
        if isinstance(filters, FiltersPart):
            scaled, filters = FILTERS.without_min_p(scaled, filters)
        scaled = ENGINE_PROCESSORS.apply_to_draws(scaled, user)
        logits = torch.where(temperature[:, None] == 0, logits, scaled)
        temperature = (temperature > 0).float()
    threshold = None
    if isinstance(filters, FiltersPart):
        threshold = FILTERS.threshold(logits, temperature, filters)
    return Processed(logits, temperature, threshold)


def errors_of(batch: Batch[Tensor]) -> dict[int, Exception]:
    """Row of the logits -> the error that a function of its request raised."""
    part = batch.parts.get(REQUEST_PROCESSORS.name)
    if not isinstance(part, RequestProcessorsPart) or part.calls.value is None:
        return {}
    return part.calls.value.errors
