"""vLLM's address of `EngineArgs`."""

from nanovllm.config import EngineArgs

__all__ = ["EngineArgs"]
