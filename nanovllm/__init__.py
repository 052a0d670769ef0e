"""nanovllm: a minimal offline LLM inference engine with vLLM's `LLM` API."""

import os

# OpenMP's waiting threads spin for this many turns and then sleep. Torch's own default, 300,000, keeps another busy process
# from the cores for milliseconds each time. OpenMP reads the variable when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from nanovllm.config import EngineArgs
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.inputs import TextPrompt, TokensPrompt
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.runner.executor import EngineDeadError
from nanovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

__all__ = [
    "LLM",
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
