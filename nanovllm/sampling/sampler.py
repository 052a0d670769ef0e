"""One token a row of logits: a pure function of logits, parameters and a uniform random
number.

The sampler sees tensors. It knows neither sequences nor where the random numbers come
from.
"""

from __future__ import annotations

from torch import Tensor

from nanovllm import kernels
from nanovllm.core.ability import SamplingAbility
from nanovllm.core.batch import Batch
from nanovllm.sampling.allowed_ids import AllowedIds
from nanovllm.sampling.bad_words import BadWords
from nanovllm.sampling.base import LogitsProcessor
from nanovllm.sampling.filters import Filters, FiltersPart
from nanovllm.sampling.logit_bias import LogitBias
from nanovllm.sampling.logprobs import SampledLogprobs
from nanovllm.sampling.min_tokens import MinTokens
from nanovllm.sampling.penalties import Penalties

# A logits processor is a file and a line here. They apply in this order, which is vLLM's.
PROCESSORS: list[LogitsProcessor] = [
    AllowedIds(),
    BadWords(),
    MinTokens(),
    LogitBias(),
    Penalties(),
]
FILTERS = Filters()


def sampling_abilities() -> list[SamplingAbility]:
    """Everything that concerns sampled tokens and that a request may leave unused."""
    return [*PROCESSORS, FILTERS, SampledLogprobs()]


def sample(logits: Tensor, batch: Batch[Tensor], last_tokens: Tensor) -> Tensor:
    """logits [K, V] of any float type -> token ids [K] int64.

    The order is vLLM's: logits processors, temperature, min-p, top-k, top-p, draw.
    `last_tokens` [table rows] holds each row's newest token. The logits may be
    overwritten.
    """
    rows = batch.sample
    for processor in PROCESSORS:
        part = batch.parts.get(processor.name)
        if part is not None:
            logits = processor.apply(logits.float(), part, rows.rows, last_tokens)
    if not len(rows.temperature):
        return kernels.argmax(logits)
    threshold = None
    filters = batch.parts.get(FILTERS.name)
    if isinstance(filters, FiltersPart):
        threshold = FILTERS.threshold(logits, rows.temperature, filters)
    return kernels.draw(logits, rows.temperature, rows.uniform, threshold)
