"""A request that has been checked, with its sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from nanovllm.core.sequence import Sequence
from nanovllm.lora.request import LoRARequest
from nanovllm.outputs import Logprob, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams


class OutputQueue(Protocol):
    """Takes the outputs of a request, such as a deque."""

    def append(self, output: RequestOutput, /) -> None: ...


@dataclass(eq=False)
class Request:
    """One prompt, its parameters and its n sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seqs: list[Sequence]
    metrics: RequestMetrics | None = None
    lora_request: LoRARequest | None = None
    queue: OutputQueue | None = None  # where its outputs go; None: LLMEngine.step returns
    prompt_logprobs: list[dict[int, Logprob] | None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(self.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return all(seq.finish_reason for seq in self.seqs)
