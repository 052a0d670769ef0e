"""The arguments of `LLM(...)`, vLLM's names: what each does here, what is accepted without effect, what is refused.

A value that would change results and that this engine cannot honour is refused by a sentence, never dropped.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DTYPES = {
    "auto": "auto",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}


@dataclass(init=False)
class EngineArgs:
    """Everything an engine is made from; `None` means "decide for me".

    `EngineArgs(model, **kwargs)` takes every argument of vLLM's: those below do something here, `NO_EFFECT` ones nothing
    that could be seen in results, `NEUTRAL` ones are accepted as long as they ask for nothing.
    Raises TypeError for an unknown name, ValueError for a value that cannot be honoured.
    """

    model: str
    tokenizer: str | None = None
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    tokenizer_revision: str | None = None
    download_dir: str | None = None
    hf_token: str | bool | None = None
    hf_overrides: dict[str, Any] | Callable[[Any], Any] | None = None
    generation_config: str = "auto"
    chat_template: str | None = None
    load_format: str = "auto"
    dtype: Any = "auto"
    device: str = "auto"
    attention_backend: str | None = None
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.92
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool | None = None
    enforce_eager: bool = False
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    disable_log_stats: bool = True
    enable_sleep_mode: bool = False
    tensor_parallel_size: int = 1
    distributed_executor_backend: str | None = None

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.model = model
        defaults = {f.name: f.default for f in fields(self) if f.name != "model"}
        for name, value in defaults.items():
            setattr(self, name, value)
        for name, value in kwargs.items():
            name = NANO_VLLM_NAMES.get(name, name)
            if name in defaults:
                setattr(self, name, defaults[name] if value is None else value)
            elif name in NEUTRAL:
                if value is not None and value not in NEUTRAL[name]:
                    accepted = ", ".join(map(repr, (None, *NEUTRAL[name])))
                    raise ValueError(f"{name}={value!r} is not supported; accepted: {accepted}")
            elif name not in NO_EFFECT:
                close = difflib.get_close_matches(name, [*defaults, *NO_EFFECT, *NEUTRAL], 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"LLM() got an unexpected keyword argument {name!r}{hint}")
        self._check()

    def _check(self) -> None:
        if not isinstance(self.model, (str, os.PathLike)):
            raise TypeError(f"model={self.model!r} must be a folder, a .gguf file or a hub name")
        self.model = str(self.model)
        dtype = str(self.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; accepted are {', '.join(DTYPES)}")
        self.dtype = DTYPES[dtype]
        one_of("load_format", self.load_format, ("auto", "safetensors", "gguf", "dummy"))
        one_of("tokenizer_mode", self.tokenizer_mode, ("auto", "slow"))
        one_of("logprobs_mode", self.logprobs_mode, ("raw_logprobs",))
        one_of("kv_cache_dtype", self.kv_cache_dtype, ("auto", "fp8"))
        self._check_generation_config()
        one_of(
            "distributed_executor_backend", self.distributed_executor_backend, (None, "uni", "mp", "external_launcher")
        )
        limits = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
        for name in (*limits, "block_size", "num_gpu_blocks_override", "kv_cache_memory_bytes"):
            positive(name, getattr(self, name), optional=True)
        positive("tensor_parallel_size", self.tensor_parallel_size)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0 and at most 1")
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs={self.max_logprobs} must be at least 0, or -1 for the whole vocabulary")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed={self.seed!r} must be an int")

    def _check_generation_config(self) -> None:
        """ "auto" is the model's generation_config.json, "vllm" takes only the end tokens of it, else it is a folder."""
        if not isinstance(self.generation_config, (str, os.PathLike)):
            raise TypeError(f"generation_config={self.generation_config!r} must be 'auto', 'vllm' or a folder")
        self.generation_config = str(self.generation_config)
        if self.generation_config not in ("auto", "vllm") and not Path(self.generation_config).expanduser().is_dir():
            raise ValueError(
                f"generation_config={self.generation_config!r} is no folder here; "
                "accepted are 'auto', 'vllm' and a folder that holds a generation_config.json"
            )


NANO_VLLM_NAMES = {"kvcache_block_size": "block_size", "num_kvcache_blocks": "num_gpu_blocks_override"}

# vLLM's arguments that change where or how fast things run, never what comes out.
NO_EFFECT = frozenset(
    [
        "swap_space",
        "cpu_offload_gb",
        "compilation_config",
        "disable_custom_all_reduce",
        "max_seq_len_to_capture",
        "max_parallel_loading_workers",
        "use_v2_block_manager",
        "num_scheduler_steps",
        "multi_step_stream_outputs",
        "disable_async_output_proc",
        "ray_workers_use_nsight",
        "model_loader_extra_config",
        "max_num_partial_prefills",
        "max_long_partial_prefills",
        "long_prefill_token_threshold",
        "disable_cascade_attn",
        "enable_flashinfer_autotune",
        "cuda_graph_sizes",
        "optimization_level",
        "performance_mode",
        "show_hidden_metrics_for_version",
        "served_model_name",
        "use_tqdm_on_load",
        "ignore_patterns",
        "safetensors_load_strategy",
        "pt_load_map_location",
        "attention_config",
        "cudagraph_capture_sizes",
        "max_cudagraph_capture_size",
        "disable_hybrid_kv_cache_manager",
        "stream_interval",
        "kv_offloading_size",
        "kv_offloading_backend",
        "kv_cache_metrics",
        "otlp_traces_endpoint",
        "collect_detailed_traces",
        "profiler_config",
        "aggregate_engine_logging",
        "disable_log_requests",
        "max_loras",
        "max_lora_rank",
        "max_cpu_loras",
        "lora_dtype",
        "fully_sharded_loras",
        "mm_processor_cache_gb",
        "disable_mm_preprocessor_cache",
        "skip_mm_profiling",
    ]
)

# Arguments with results behind them that this engine does not have: the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "enable_expert_parallel": (False,),
    "quantization": (),
    "calculate_kv_scales": (False,),
    "enable_lora": (False,),
    "lora_modules": (),
    "speculative_config": (),
    "speculative_model": (),
    "num_speculative_tokens": (0,),
    "guided_decoding_backend": ("auto",),
    "structured_outputs_config": (),
    "logits_processors": ([], ()),
    "limit_mm_per_prompt": ({},),
    "mm_processor_kwargs": ({},),
    "allowed_local_media_path": ("",),
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "override_generation_config": ({},),
    "override_neuron_config": ({},),
    "rope_scaling": ({},),
    "rope_theta": (),
    "kv_transfer_config": (),
    "kv_events_config": (),
    "pooler_config": (),
    "override_pooler_config": (),
    "reasoning_parser": ("",),
    "scheduling_policy": ("fcfs",),
    "preemption_mode": ("recompute",),
    "prefix_caching_hash_algo": ("xxhash", "builtin", "sha256"),
    "model_impl": ("auto",),
    "config_format": ("auto", "hf"),
    "additional_config": ({},),
    "code_revision": (),
    "disable_sliding_window": (False,),
    "return_tokens_as_token_ids": (False,),
    "worker_cls": ("auto",),
    "worker_extension_cls": ("",),
    "scheduler_cls": (),
    "hf_config_path": (),
    "enable_prompt_embeds": (False,),
    "enable_eplb": (False,),
    "enable_dbo": (False,),
    "prefill_context_parallel_size": (1,),
    "nnodes": (1,),
    "weight_transfer_config": (),
}


def one_of(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not known; accepted are {', '.join(map(repr, accepted))}")


def positive(name: str, value: int | None, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
