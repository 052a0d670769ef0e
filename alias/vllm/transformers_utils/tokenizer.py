"""Older addresses of what `vllm.tokenizers` has."""

from vllm.tokenizers import AnyTokenizer, get_tokenizer

__all__ = ["AnyTokenizer", "get_tokenizer"]
