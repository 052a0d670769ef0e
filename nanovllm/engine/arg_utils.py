"""vLLM's address of `EngineArgs` and `AsyncEngineArgs`."""

from nanovllm.config import AsyncEngineArgs, EngineArgs

__all__ = ["AsyncEngineArgs", "EngineArgs"]
