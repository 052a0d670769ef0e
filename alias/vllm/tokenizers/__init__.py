"""Tokenizers of Hugging Face, as the engine loads them."""

from typing import Any

from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as AnyTokenizer

TokenizerLike = AnyTokenizer


def get_tokenizer(
    tokenizer_name: str,
    *args: object,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    download_dir: str | None = None,
    **kwargs: Any,
) -> AnyTokenizer:
    """The tokenizer of a folder or a hub name. `tokenizer_mode="slow"` takes Python's own."""
    if tokenizer_mode not in ("auto", "hf", "slow"):
        raise ValueError(
            f"tokenizer_mode={tokenizer_mode!r} is not known; accepted are 'auto', 'hf' and 'slow'"
        )
    if tokenizer_mode == "slow":
        kwargs["use_fast"] = False
    return AutoTokenizer.from_pretrained(
        tokenizer_name,
        *args,
        trust_remote_code=trust_remote_code,
        revision=revision,
        cache_dir=download_dir,
        **kwargs,
    )


__all__ = ["AnyTokenizer", "TokenizerLike", "get_tokenizer"]
