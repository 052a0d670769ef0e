"""Counters of an engine since it was made, and vLLM's names for them."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class EngineStats:
    """All counts are of tokens, except `num_preemptions`."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


@dataclass(frozen=True)
class Metric:
    """A counter (it only grows) or a gauge (it goes up and down)."""

    name: str
    value: float


def metrics(stats: EngineStats, gauges: dict[str, float]) -> list[Metric]:
    return [Metric(f"vllm:{name}", value) for name, value in {**asdict(stats), **gauges}.items()]
