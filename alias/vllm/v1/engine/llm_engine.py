from nanovllm.engine.llm_engine import LLMEngine

__all__ = ["LLMEngine"]
