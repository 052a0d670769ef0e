"""vLLM's environment variables, as text. The engine reads none of them."""

import os


def __getattr__(name: str) -> str | None:
    """The variable's value. None if it is not set."""
    if not name.startswith("VLLM_"):
        raise AttributeError(f"module 'vllm.envs' has no attribute {name!r}")
    return os.environ.get(name)
