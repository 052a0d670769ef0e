"""An address of older versions of vLLM."""

from nanovllm.outputs import Logprob, RequestMetrics

__all__ = ["Logprob", "RequestMetrics"]
