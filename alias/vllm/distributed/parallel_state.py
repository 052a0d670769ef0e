"""What scripts call after they have deleted an `LLM`. An engine ends its own ranks."""

import gc


def destroy_model_parallel() -> None:
    """No effect, because each engine closes its own groups."""


def destroy_distributed_environment() -> None:
    """No effect, because each engine closes its own groups."""


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Collects garbage, and gives unused memory of GPUs back. shutdown_ray: no effect."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
