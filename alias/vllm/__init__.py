"""nanovllm under the name `vllm`, for programs that import vLLM by its own name.

Knows only names: nanovllm does the work. Names are imported when they are asked for.
"""

from importlib import import_module

from vllm import only_one
from vllm.version import __version__, __version_tuple__

only_one.check()

# A name of vLLM -> the module here that has it.
EXPORTS = {
    "LLM": "vllm.entrypoints.llm",
    "AsyncEngineArgs": "vllm.engine.arg_utils",
    "AsyncLLMEngine": "vllm.engine.async_llm_engine",
    "CompletionOutput": "vllm.outputs",
    "EngineArgs": "vllm.engine.arg_utils",
    "LLMEngine": "vllm.engine.llm_engine",
    "PromptType": "vllm.inputs",
    "RequestOutput": "vllm.outputs",
    "SamplingParams": "vllm.sampling_params",
    "TextPrompt": "vllm.inputs",
    "TokensPrompt": "vllm.inputs",
}

__all__ = ["__version__", "__version_tuple__", *EXPORTS]


def __getattr__(name: str) -> object:
    if name in EXPORTS:
        value = getattr(import_module(EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vllm' (nanovllm under that name) has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *EXPORTS]
