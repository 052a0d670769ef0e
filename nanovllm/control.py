"""What a user does to an engine besides running requests: sleep, wake up, read its defaults."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ValidationError
from nanovllm.runner.executor import Worker
from nanovllm.runner.sleep import TAGS
from nanovllm.sampling_params import SamplingParams

# A field of generation_config.json -> the parameter of SamplingParams. vLLM reads no
# others.
SAMPLING_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling_params(engine: LLMEngine) -> SamplingParams:
    """What the model's generation_config.json recommends (nothing with
    generation_config="vllm"), and override_generation_config over it.

    Raises ValueError, naming file and field, for a value that SamplingParams does not
    accept.
    """
    config = engine.setup.sampling_defaults
    override = engine.args.override_generation_config or {}
    found = {field: config[field] for field in SAMPLING_DEFAULTS if config.get(field) is not None}
    for field, value in found.items():
        try:
            SamplingParams.from_optional(**{SAMPLING_DEFAULTS[field]: value})
        except (TypeError, ValueError) as error:
            path = engine.setup.generation_config_path
            source = "override_generation_config" if field in override else path
            raise ValidationError(f"{source}: {field}={value!r}: {error}") from error
    return SamplingParams.from_optional(
        **{SAMPLING_DEFAULTS[field]: value for field, value in found.items()}
    )


def apply_to_model(worker: Worker, function: Callable[[nn.Module], object]) -> object:
    return function(worker.model_runner.model)


def sleep(engine: LLMEngine, level: int) -> None:
    """Frees the KV cache. Level 1 moves the weights to the host's memory, level 2 drops them."""
    if level not in (1, 2):
        raise ValidationError(
            f"level={level!r} is not known; accepted are 1 (weights to the host) and 2 (weights "
            "dropped)"
        )
    with engine.exclusive():
        count = engine.get_num_unfinished_requests()
        if count:
            raise ValidationError(f"sleep: {count} requests are unfinished; finish or abort them")
        engine.reset()
        engine.collective_rpc("sleep", args=(level,))


def wake_up(engine: LLMEngine, tags: list[str] | None) -> None:
    if not set(TAGS).issuperset(tags or ()):
        raise ValidationError(f"tags={tags!r} are not known; accepted are 'weights' and 'kv_cache'")
    with engine.exclusive():
        engine.collective_rpc("wake_up", args=(tags,))
