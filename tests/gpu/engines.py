"""Small engines on a GPU, for tests."""

from __future__ import annotations

from typing import Any

from tiny import random_prompts

from nanovllm import LLM, SamplingParams

PROMPTS = random_prompts([1, 15, 16, 17, 100, 33, 5, 70, 3, 9, 40])


def make_llm(folder: str, *, graphs: bool = True, **kwargs: Any) -> LLM:
    defaults = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_num_batched_tokens": 64,
        "max_num_seqs": 20,
        "block_size": 16,
        "num_gpu_blocks_override": 80,
        "enforce_eager": not graphs,
    }
    return LLM(folder, **{**defaults, **kwargs})


def recorded(llm: LLM) -> bool:
    return llm.llm_engine.executor.runner.graphs is not None


def recorded_pieces(llm: LLM) -> bool:
    """Whether steps with prompts replay graphs."""
    return llm.llm_engine.executor.runner.pieces is not None


def tokens_of(llm: LLM, prompts: list[list[int]], num_tokens: int = 20) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
