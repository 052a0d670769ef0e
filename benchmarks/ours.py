"""With host_time.py the only file of the benchmark that knows the inside of nanovllm.

engines.py imports this file only in nanovllm's process: peers run without nanovllm.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanovllm import kernels, loader
from nanovllm.core.batch import Batch, ceil_div
from nanovllm.core.step import Step
from nanovllm.engine import llm_engine
from nanovllm.engine.batch_builder import build_batch
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.scheduler import Scheduler
from nanovllm.loader import gguf_tokenizer
from nanovllm.models.config import ModelConfig
from nanovllm.models.registry import read_config
from nanovllm.runner.model_runner import PendingStep
from nanovllm.runner.readouts.next_tokens import NextTokens
from nanovllm.runner.setup import pick_dtype
from nanovllm.sampling.sampler import sampling_abilities
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

PAGE = 16  # tokens of a page of the KV cache
VOCAB_SIZE = 151936  # of Qwen3
ABILITIES = sampling_abilities()


def default_dtype(device: str) -> torch.dtype:
    """The dtype of LLM(dtype="auto") for a checkpoint in bfloat16."""
    return pick_dtype("auto", torch.bfloat16, torch.device(device))


def model_config(model: str, dummy: bool = False) -> ModelConfig:
    """The config of a model.

    With `dummy` a folder that holds only a config.json is enough.
    """
    files = loader.resolve(model, load_format="dummy" if dummy else "auto")
    return read_config(loader.load_hf_config(files))


class Checkpoint:
    """A GGUF file as Hugging Face's libraries see a model."""

    def __init__(self, file: Path) -> None:
        self.files = loader.resolve(str(file))

    def config(self) -> dict[str, Any]:
        """The fields of config.json."""
        assert self.files.gguf is not None
        return self.files.gguf.hf_fields()

    def has_tokenizer(self) -> bool:
        assert self.files.gguf is not None
        return bool(self.files.gguf.tokens)

    def save_tokenizer(self, folder: Path) -> None:
        assert self.files.gguf is not None
        gguf_tokenizer.load_tokenizer(self.files.gguf).to_transformers().save_pretrained(folder)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) of every parameter, dequantised, read one by one."""
        for name, tensor in loader.iter_weights(self.files):
            yield name, tensor[...]


class Host:
    """The host's half of an engine, without a model: every sampled token is token 7."""

    def __init__(
        self,
        prompts: list[list[int]],
        outputs: list[int],
        max_model_len: int,
        step_tokens: int,
        filters: dict[str, Any] | None = None,
    ) -> None:
        """outputs[i]: new tokens of prompts[i]. step_tokens: the most tokens of a step.

        filters: arguments of SamplingParams, beside a temperature of 0.6. The KV cache is
        large enough for all requests, so that none is preempted.
        """
        self.tokens = np.full(len(prompts), 7, np.int64)
        pages = sum(ceil_div(len(p) + n, PAGE) for p, n in zip(prompts, outputs))
        columns: dict[str, type] = {}
        for ability in ABILITIES:
            columns.update(ability.columns)
        self.scheduler = Scheduler(
            num_blocks=pages,
            block_size=PAGE,
            max_model_len=max_model_len,
            max_num_seqs=len(prompts),
            max_num_batched_tokens=step_tokens,
            columns=columns,
        )
        processor = InputProcessor(
            None,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=frozenset(),
            max_model_len=max_model_len,
            seed=0,
            abilities=ABILITIES,
        )
        for i, (prompt, count) in enumerate(zip(prompts, outputs)):
            params = SamplingParams(
                temperature=0.6, max_tokens=count, ignore_eos=True, **(filters or {})
            )
            request = processor.process(
                str(i), prompt, params, max_logprobs=20, output_kind=RequestOutputKind.FINAL_ONLY
            )
            self.scheduler.add(*request.seqs)

    def schedule(self) -> Step | None:
        """The next step, or None after the last."""
        return self.scheduler.schedule()

    def prepare(self, step: Step) -> Batch[np.ndarray]:
        """The arrays that the device half gets."""
        batch, _ = build_batch(self.scheduler.table, step, PAGE, ABILITIES)
        return batch

    def update(self, step: Step) -> None:
        self.scheduler.update(step, self.tokens[: len(step.sampled)])

    def passes(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Of each step: positions (starts, ends) as int arrays, and how many rows sample."""
        while step := self.schedule():
            yield step.starts, step.ends, len(step.sampled)
            self.update(step)


# -- in the engine's process -----------------------------------------------------------------------


def settle(llm: Any) -> None:
    """Writes all KV pages once.

    On a CPU the kernel gives memory to a page when it is first written, which is slow.
    Peers write their cache when they start, and a long-lived engine has written it
    (docs/experiments.md).
    """
    for pages in llm.llm_engine.executor.runner.attention.cache:
        pages.zero_()


def kv_cache_bytes(llm: Any) -> int:
    runner = llm.llm_engine.executor.runner
    return runner.num_blocks * runner.attention.page_bytes()


def profile_targets(llm: Any) -> list[tuple[Any, str, str]]:
    """(owner, name of the function, label) of the parts of a step, for engines.Parts."""
    engine = llm.llm_engine
    runner = engine.executor.runner
    attention = runner.attention
    runner.programs = None  # a replayed program calls none of these functions
    return [
        (engine, "add_request", "add requests"),
        (engine.scheduler, "schedule", "schedule"),
        (llm_engine, "build_batch", "prepare"),
        (runner, "launch", "model: the rest"),
        (kernels, "linear", "model: matrix products"),
        (kernels.cpu, "linear_panels", "model: matrix products"),
        (attention, "write", "model: QK-norm, RoPE, K/V store"),
        (attention, "attend", "model: attention"),
        (kernels, "rms_norm", "model: norms, SwiGLU"),
        (kernels, "add_rms_norm", "model: norms, SwiGLU"),
        (kernels, "silu_and_mul", "model: norms, SwiGLU"),
        (NextTokens, "sample", "sample"),
        (PendingStep, "collect", "wait for the device"),
        (engine.scheduler, "update", "update"),
        (engine.output_processor, "take", "make outputs"),
        (engine.output_processor, "outputs", "make outputs"),
        (Detokenizer, "decode", "detokenise"),
    ]
