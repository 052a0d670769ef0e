"""An engine's state from outside: what clients read of it, metrics, sleeping and waking. Nothing here runs in a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ValidationError
from nanovllm.runner import memory
from nanovllm.runner.executor import Worker
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine

TOTALS = ("prompt_tokens", "generation_tokens", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits")
PARTS = {"weights", "kv_cache"}


@dataclass(frozen=True)
class Metric:
    """A counter (it only grows) or a gauge; token counts are of all requests since the engine was made."""

    name: str
    value: float


def describe(engine: LLMEngine) -> tuple[SimpleNamespace, SimpleNamespace, SimpleNamespace]:
    """What clients of vLLM read: model_config, scheduler_config, and model_executor.driver_worker.model_runner.model,
    which RL trainers load new weights into.
    """
    setup, vocab_size = engine.setup, engine.vocab_size
    model_config = SimpleNamespace(
        model=engine.args.model,
        tokenizer=engine.args.tokenizer or engine.args.model,
        tokenizer_mode=engine.args.tokenizer_mode,
        skip_tokenizer_init=engine.args.skip_tokenizer_init,
        trust_remote_code=engine.args.trust_remote_code,
        revision=engine.args.revision,
        tokenizer_revision=engine.args.tokenizer_revision,
        served_model_name=engine.args.model,
        runner_type="generate",
        max_model_len=engine.max_model_len,
        max_seq_len_to_capture=engine.max_model_len,
        max_logprobs=engine.args.max_logprobs,
        enforce_eager=engine.args.enforce_eager,
        is_encoder_decoder=False,
        is_multimodal_model=False,
        hf_config=setup.hf_config,
        hf_text_config=setup.hf_config,
        dtype=setup.dtype,
        seed=engine.args.seed,
        get_vocab_size=lambda: vocab_size,
    )
    scheduler_config = SimpleNamespace(
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        max_model_len=engine.max_model_len,
        async_scheduling=engine.overlap,
    )
    return model_config, scheduler_config, SimpleNamespace(driver_worker=Worker(engine.runner))


def default_sampling(engine: LLMEngine) -> dict[str, Any]:
    """What generation_config.json recommends, as arguments of SamplingParams; nothing with generation_config="vllm".

    Like vLLM this reads the fields below and no other: `do_sample` changes nothing.
    Raises ValueError, naming the file, for a value that SamplingParams does not accept.
    """
    if engine.args.generation_config == "vllm":
        return {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
    config = engine.setup.generation_config
    found = {name.replace("max_new_", "max_"): config[name] for name in names if config.get(name) is not None}
    for name, value in found.items():
        try:
            SamplingParams.from_optional(**{name: value})
        except (TypeError, ValueError) as err:
            field = name.replace("max_", "max_new_")
            raise ValidationError(f"{engine.setup.generation_config_path}: {field}={value!r}: {err}") from err
    return found


def apply_to_model(rank: Any, func: Callable[[Any], Any]) -> Any:
    return func(rank.model_runner.model)


def sleep_rank(rank: Any, level: int) -> None:
    memory.sleep(rank.model_runner, level)


def wake_up_rank(rank: Any, tag: str) -> None:
    memory.wake_up(rank.model_runner, tag)


def sleep(engine: LLMEngine, level: int) -> None:
    if level not in (1, 2):
        raise ValidationError(
            f"level={level!r} is not known; accepted are 1 (weights to the host) and 2 (weights dropped)"
        )
    with engine.turn():
        if engine.has_unfinished_requests():
            count = engine.get_num_unfinished_requests()
            raise ValidationError(f"sleep: {count} requests are unfinished; finish or abort them")
        engine.reset()
        engine.collective_rpc(sleep_rank, (level,))


def wake_up(engine: LLMEngine, tags: list[str] | None) -> None:
    wanted = PARTS if tags is None else set(tags)
    if not wanted <= PARTS:
        raise ValidationError(f"tags={tags!r} are not known; accepted are 'weights' and 'kv_cache'")
    with engine.turn():
        for tag in sorted(wanted & engine.asleep, reverse=True):
            engine.collective_rpc(wake_up_rank, (tag,))


def totals(engine: LLMEngine) -> dict[str, int]:
    return {name: engine.totals[name] + getattr(engine.scheduler, name) for name in TOTALS}


def metrics(engine: LLMEngine) -> list[Metric]:
    scheduler, blocks = engine.scheduler, engine.scheduler.blocks
    gauges = {
        "num_requests_running": len(scheduler.order),
        "num_requests_waiting": len(scheduler.waiting),
        "kv_cache_usage_perc": 1 - blocks.num_free / blocks.num_blocks,
    }
    return [Metric(f"vllm:{name}", value) for name, value in {**totals(engine), **gauges}.items()]
