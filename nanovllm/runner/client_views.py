"""What clients of vLLM read of an engine: its configuration, and the way to its model."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from nanovllm import loader
from nanovllm.runner.executor import Worker
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.setup import Setup


@dataclass
class ModelExecutor:
    """RL trainers load weights into `model_executor.driver_worker.model_runner.model`."""

    driver_worker: Worker


def model_config(setup: Setup) -> SimpleNamespace:
    args = setup.args
    vocab_size = setup.config.vocab_size
    hf_config = loader.pretrained(setup.hf_config)
    return SimpleNamespace(
        model=args.model,
        tokenizer=args.tokenizer or args.model,
        tokenizer_mode=args.tokenizer_mode,
        skip_tokenizer_init=args.skip_tokenizer_init,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
        tokenizer_revision=args.tokenizer_revision,
        served_model_name=args.model,
        runner_type="generate",
        max_model_len=setup.max_model_len,
        max_seq_len_to_capture=setup.max_model_len,
        max_logprobs=args.max_logprobs,
        enforce_eager=args.enforce_eager,
        is_encoder_decoder=False,
        is_multimodal_model=False,
        hf_config=hf_config,
        hf_text_config=loader.text_config(hf_config),
        dtype=setup.dtype,
        seed=args.seed,
        get_vocab_size=lambda: vocab_size,
    )


def scheduler_config(setup: Setup, overlap: bool) -> SimpleNamespace:
    return SimpleNamespace(
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        max_model_len=setup.max_model_len,
        async_scheduling=overlap,
    )


def model_executor(runner: ModelRunner) -> ModelExecutor:
    return ModelExecutor(Worker(runner))
