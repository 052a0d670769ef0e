from nanovllm.async_llm import AsyncLLMEngine

__all__ = ["AsyncLLMEngine"]
