"""Names that trainers import for vLLM's server. There is no server here, so each is refused."""

from typing import NoReturn


def refuse(name: str) -> NoReturn:
    """Raises ValueError."""
    raise ValueError(
        f"{name} is not supported: it sends weights to a vLLM server; give (name, tensor) pairs "
        "to the model's load_weights instead (in TRL: vllm_mode='colocate')"
    )
