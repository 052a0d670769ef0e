"""Names of vLLM and nano-vLLM that this engine ignores, renames or refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from nanovllm.errors import ValidationError

# nano-vLLM's names of arguments -> vLLM's.
NANO_VLLM_NAMES = {
    "kvcache_block_size": "block_size",
    "num_kvcache_blocks": "num_gpu_blocks_override",
}

# vLLM's arguments that may change speed, memory or logs, and never change results.
NO_EFFECT = frozenset(
    [
        "swap_space",
        "cpu_offload_gb",
        "offload_group_size",
        "offload_num_in_group",
        "offload_prefetch_step",
        "offload_params",
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
        "optimization_level",
        "performance_mode",
        "show_hidden_metrics_for_version",
        "served_model_name",
        "use_tqdm_on_load",
        "ignore_patterns",
        "safetensors_load_strategy",
        "pt_load_map_location",
        "attention_config",
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
        "enable_log_requests",
        "data_parallel_backend",
        "fully_sharded_loras",
        "specialize_active_lora",
        "mm_processor_cache_gb",
        "disable_mm_preprocessor_cache",
        "skip_mm_profiling",
        "language_model_only",
        "mm_encoder_tp_mode",
    ]
)

# vLLM's arguments for abilities that this engine lacks -> the values that use no such
# ability. None is neutral for all arguments.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "pipeline_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "calculate_kv_scales": (False,),
    "lora_modules": (),
    "lora_target_modules": (),
    "default_mm_loras": ({},),
    "speculative_config": (),
    "speculative_model": (),
    "num_speculative_tokens": (0,),
    "spec_method": (),
    "spec_model": (),
    "spec_tokens": (0,),
    "quantization_config": (),
    "enable_return_routed_experts": (False,),
    "return_sampling_mask": (False,),
    "guided_decoding_backend": ("auto",),
    "structured_outputs_config": (),
    "mm_processor_kwargs": ({},),
    "allowed_local_media_path": ("",),
    "allowed_media_domains": ([],),
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "override_neuron_config": ({},),
    "rope_scaling": ({},),
    "rope_theta": (),
    "kv_transfer_config": (),
    "kv_events_config": (),
    "pooler_config": (),
    "override_pooler_config": (),
    "reasoning_parser": ("",),
    "preemption_mode": ("recompute",),
    "prefix_caching_hash_algo": ("xxhash", "builtin", "sha256"),
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

NO_POOLING = "a pooling model is needed, and this engine runs models that generate"
NO_PROFILER = "use torch.profiler around generate"
NO_TRANSFER = "use apply_model: the model's load_weights takes (name, tensor) pairs"

# Methods of vLLM's LLM that this engine lacks -> the reason, or the replacement.
REFUSED_METHODS = {
    "encode": NO_POOLING,
    "embed": NO_POOLING,
    "classify": NO_POOLING,
    "score": NO_POOLING,
    "reward": NO_POOLING,
    "start_profile": NO_PROFILER,
    "stop_profile": NO_PROFILER,
    "release_kv_cache_memory": "use sleep(level=1), which frees the KV cache",
    "init_weight_transfer_engine": NO_TRANSFER,
    "shutdown_weight_transfer_engine": NO_TRANSFER,
    "start_weight_update": NO_TRANSFER,
    "start_draft_weight_update": NO_TRANSFER,
    "update_weights": NO_TRANSFER,
    "finish_weight_update": NO_TRANSFER,
    "update_weight_version": NO_TRANSFER,
    "get_weight_version": NO_TRANSFER,
}


def refused(name: str, reason: str) -> Callable[..., NoReturn]:
    """A method that raises ValidationError when it is called."""

    def method(self: object, *args: object, **kwargs: object) -> NoReturn:
        raise ValidationError(f"{name} is not supported: {reason}")

    return method
