from nanovllm.errors import VLLMValidationError

__all__ = ["VLLMValidationError"]
