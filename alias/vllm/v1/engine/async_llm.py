from nanovllm.async_llm import AsyncLLM
from nanovllm.config import AsyncEngineArgs

__all__ = ["AsyncEngineArgs", "AsyncLLM"]
