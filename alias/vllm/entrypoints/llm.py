from nanovllm.llm import LLM

__all__ = ["LLM"]
