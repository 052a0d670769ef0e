"""nanovllm: a minimal offline LLM inference engine with vLLM's `LLM` API."""

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]
