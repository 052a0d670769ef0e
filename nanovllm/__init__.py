"""nanovllm: a minimal offline LLM inference engine with vLLM's `LLM` API."""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM, AsyncLLMEngine
    from nanovllm.config import AsyncEngineArgs, EngineArgs
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.inputs import TextPrompt, TokensPrompt
    from nanovllm.llm import LLM
    from nanovllm.outputs import CompletionOutput, RequestOutput
    from nanovllm.runner.executor import EngineDeadError
    from nanovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

__version__ = "0.2.0"

# OpenMP's waiting threads spin this many times and then sleep. Torch's default of 300,000 takes the
# cores from other busy processes (docs/experiments.md). OpenMP reads the variable with torch.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# Imported when they are asked for, because the host half of the engine runs without torch.
EXPORTS = {
    "LLM": "llm",
    "AsyncEngineArgs": "config",
    "AsyncLLM": "async_llm",
    "AsyncLLMEngine": "async_llm",
    "BeamSearchParams": "sampling_params",
    "CompletionOutput": "outputs",
    "EngineArgs": "config",
    "EngineDeadError": "runner.executor",
    "LLMEngine": "engine.llm_engine",
    "RequestOutput": "outputs",
    "RequestOutputKind": "sampling_params",
    "SamplingParams": "sampling_params",
    "TextPrompt": "inputs",
    "TokensPrompt": "inputs",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineArgs",
    "EngineDeadError",
    "LLMEngine",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
]


def __getattr__(name: str) -> object:
    if name not in EXPORTS:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    value = getattr(import_module(f"nanovllm.{EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *EXPORTS]
