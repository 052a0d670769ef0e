"""The results of a request, with vLLM's names. Plain records that know no engine.

Times are seconds of `time.monotonic`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.lora.request import LoRARequest


@dataclass(slots=True)
class Logprob:
    """The natural log of one token's probability.

    `rank` is the token's place in the whole vocabulary, from 1.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One of a request's n completions.

    The EOS or stop token that ends a completion is in `token_ids` and not in `text`.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    # One dict for each generated token. The sampled token is the first key.
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    # The stop token or stop string; None for EOS. After an error its message.
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Times of a request's events; None before the event.

    The properties ending in _ts are newer names in vLLM.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0

    @property
    def queued_ts(self) -> float:
        return self.arrival_time

    @property
    def scheduled_ts(self) -> float | None:
        return self.first_scheduled_time

    @property
    def first_token_ts(self) -> float | None:
        return self.first_token_time

    @property
    def last_token_ts(self) -> float | None:
        return self.last_token_time

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first scheduled step."""
        if self.first_scheduled_time is None:
            return None
        return self.first_scheduled_time - self.arrival_time

    @property
    def first_token_latency(self) -> float | None:
        """Seconds from arrival to the first generated token."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time


@dataclass
class RequestOutput:
    """A request and its completions so far.

    `output["text"]` and `output["token_ids"]` are the first completion's (nano-vLLM).
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    # One dict for each prompt token. The first has None, because no token precedes it.
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    lora_request: LoRARequest | None = None
    encoder_prompt: str | None = None  # None: no model here has an encoder
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None

    def __getitem__(self, key: str) -> str | list[int]:
        if key not in ("text", "token_ids"):
            raise KeyError(
                f"a RequestOutput has the keys 'text' and 'token_ids', not {key!r}; "
                "use attributes for other values"
            )
        first = self.outputs[0]
        return first.text if key == "text" else first.token_ids


@dataclass
class BeamSearchSequence:
    """One beam. `tokens` and `text` hold the prompt and the generated tokens."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None


@dataclass
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]
