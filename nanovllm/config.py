"""The arguments of `LLM(...)` and their rules. Knows neither files nor devices.

The engine refuses a value that would change results if the engine ignored it.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nanovllm import cli_args
from nanovllm.compat import NANO_VLLM_NAMES, NEUTRAL, NO_EFFECT
from nanovllm.compilation import Compilation

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from typing_extensions import Self

# vLLM's names of dtypes -> torch's.

DTYPES = {
    "auto": "auto",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
TRACE_ENDINGS = (".html", ".jsonl", ".json")
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


Parser = TypeVar("Parser", bound=argparse.ArgumentParser)
DEFAULT_MODEL = "Qwen/Qwen3-0.6B"  # of the command line, as in vLLM


@dataclass(init=False)
class EngineArgs:
    """The arguments of an engine. None stands for the engine's own choice.

    `EngineArgs(model, **kwargs)` takes every argument of vLLM's. The fields below have an
    effect. Arguments in `NO_EFFECT` are ignored. Arguments in `NEUTRAL` must have a
    neutral value. Raises TypeError for an unknown name, ValueError for a refused value.
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
    hf_overrides: dict[str, object] | Callable[[PretrainedConfig], object] | None = None
    generation_config: str = "auto"
    override_generation_config: dict[str, object] | None = None  # over generation_config.json
    chat_template: str | None = None
    load_format: str = "auto"
    model_impl: str = "auto"  # "transformers": run transformers' own code; "vllm": never
    dtype: str = "auto"  # a torch.dtype is accepted too
    quantization: str | None = None  # None: as the checkpoint says; "none": dequantised
    device: str = "auto"
    attention_backend: str | None = None
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.92  # share of the device's memory
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool | None = None
    enforce_eager: bool = False  # no torch.compile, no CUDA graphs, no recorded CPU programs
    compilation_config: dict[str, object] | Compilation | int | str | None = None
    cudagraph_capture_sizes: Sequence[int] | None = None  # numbers of sequences with graphs
    max_cudagraph_capture_size: int | None = None
    cuda_graph_sizes: Sequence[int] | None = None  # the older form: sizes, or the largest alone
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    logits_processors: Sequence[object] | None = None  # classes, or names "module:Class"
    scheduling_policy: str = "fcfs"  # or "priority": lower values of `priority` run first
    disable_log_stats: bool = True
    enable_sleep_mode: bool = False
    enable_lora: bool = False
    max_loras: int = 1  # different adapters in one step
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None  # adapters in memory; None: max_loras
    lora_dtype: str = "auto"  # the precision of the adapters' numbers; "auto": the model's
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    data_parallel_size: int = 1  # engines over one queue, each in a process of its own
    distributed_executor_backend: str | None = None
    step_timeout: float | None = None  # seconds after which a rank that hangs ends the engine
    trace: str | None = None  # file that records the run: .html, .jsonl or .json

    def __init__(self, model: str, **kwargs: object) -> None:
        self.model = model
        defaults = {f.name: f.default for f in fields(self) if f.name != "model"}
        for name, value in defaults.items():
            setattr(self, name, value)
        for given, value in kwargs.items():
            name = NANO_VLLM_NAMES.get(given, given)
            if name in defaults:
                setattr(self, name, defaults[name] if value is None else value)
            elif name in NEUTRAL:
                check_neutral(name, value)
            elif name == "limit_mm_per_prompt":
                check_no_media(value)
            elif name not in NO_EFFECT:
                close = difflib.get_close_matches(name, accepted_names(), 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"LLM() got an unexpected keyword argument {name!r}{hint}")
        self._check()

    @staticmethod
    def add_cli_args(parser: Parser) -> Parser:
        """Adds an option for each argument, such as --max-model-len. Returns the parser."""
        others = NO_EFFECT | NEUTRAL.keys()
        cli_args.add_options(parser, EngineArgs, others, DEFAULT_MODEL)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """The arguments in what a parser with `add_cli_args` has read."""
        values: dict[str, Any] = cli_args.chosen(args, EngineArgs, NO_EFFECT | NEUTRAL.keys())
        return cls(**values)

    def _check(self) -> None:
        self._check_names()
        self._check_numbers()
        self._check_generation_config()
        self._check_lora()
        self._check_trace()
        self.compilation_config = self.compilation

    @property
    def compilation(self) -> Compilation:
        """What `compilation_config` and the arguments beside it say together."""
        found = Compilation.read(self.compilation_config)
        sizes, largest = self.cudagraph_capture_sizes, self.max_cudagraph_capture_size
        if self.cuda_graph_sizes is not None and len(self.cuda_graph_sizes) == 1:
            found = found.with_sizes(None, self.cuda_graph_sizes[0])
        else:
            found = found.with_sizes(self.cuda_graph_sizes, None)
        found = found.with_sizes(sizes, largest)
        return found.eager() if self.enforce_eager else found

    def _check_names(self) -> None:
        if not isinstance(self.model, (str, os.PathLike)):
            raise TypeError(f"model={self.model!r} must be a folder, a .gguf file or a hub name")
        self.model = str(self.model)
        dtype = str(self.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; accepted are {', '.join(DTYPES)}")
        self.dtype = DTYPES[dtype]
        self._check_formats()
        one_of("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        one_of("logprobs_mode", self.logprobs_mode, LOGPROBS_MODES)
        if not isinstance(self.logits_processors, (list, tuple, type(None))):
            raise TypeError(
                f"logits_processors={self.logits_processors!r} must be None or a list of classes "
                "and names like 'module:Class'"
            )
        one_of("quantization", self.quantization, (None, "none", "gguf", "mxfp4"))
        one_of("kv_cache_dtype", self.kv_cache_dtype, ("fp8", *DTYPES))
        one_of(
            "distributed_executor_backend",
            self.distributed_executor_backend,
            (None, "uni", "mp", "external_launcher"),
        )

    def _check_numbers(self) -> None:
        limits = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
        for name in (*limits, "block_size", "num_gpu_blocks_override", "kv_cache_memory_bytes"):
            positive(name, getattr(self, name), optional=True)
        positive("tensor_parallel_size", self.tensor_parallel_size)
        positive("data_parallel_size", self.data_parallel_size)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0 and "
                "at most 1"
            )
        timeout = self.step_timeout
        if timeout is not None and (isinstance(timeout, bool) or not timeout > 0):
            raise ValueError(
                f"step_timeout={timeout!r} must be None or a number of seconds above 0"
            )
        if self.max_logprobs < -1:
            raise ValueError(
                f"max_logprobs={self.max_logprobs} must be at least 0, or -1 for the whole "
                "vocabulary"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed={self.seed!r} must be an int")

    @property
    def num_adapters(self) -> int:
        """How many LoRA adapters may be in memory."""
        return self.max_cpu_loras or self.max_loras

    def _check_lora(self) -> None:
        for name in ("enable_lora", "enable_expert_parallel"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be True or False")
        positive("max_loras", self.max_loras)
        positive("max_lora_rank", self.max_lora_rank)
        positive("max_cpu_loras", self.max_cpu_loras, optional=True)
        if self.num_adapters < self.max_loras:
            raise ValueError(
                f"max_cpu_loras={self.max_cpu_loras} must be at least max_loras={self.max_loras}"
            )
        dtype = str(self.lora_dtype).removeprefix("torch.")
        one_of("lora_dtype", dtype, tuple(DTYPES))
        self.lora_dtype = DTYPES[dtype]

    def _check_trace(self) -> None:
        if self.trace is None:
            return
        if not isinstance(self.trace, (str, os.PathLike)):
            raise TypeError(f"trace={self.trace!r} must be None or the path of a file")
        self.trace = str(self.trace)
        if Path(self.trace).suffix not in TRACE_ENDINGS:
            raise ValueError(
                f"trace={self.trace!r} must end in .html (a page), .jsonl (one record a line) or "
                ".json (Chrome's trace events)"
            )
        if self.data_parallel_size > 1:
            raise ValueError(
                f"data_parallel_size={self.data_parallel_size}: a trace records one engine; "
                "accepted with trace is 1"
            )
        if self.distributed_executor_backend == "external_launcher":
            raise ValueError(
                "distributed_executor_backend='external_launcher': all processes would write "
                f"trace={self.trace!r}; accepted with trace are None, 'uni' and 'mp'"
            )

    def _check_formats(self) -> None:
        if self.load_format == "fastsafetensors":  # another reader of the same files
            self.load_format = "safetensors"
        one_of("load_format", self.load_format, ("auto", "safetensors", "gguf", "dummy"))
        if self.model_impl == "nanovllm":
            self.model_impl = "vllm"  # our own models, by either name
        one_of("model_impl", self.model_impl, ("auto", "vllm", "transformers"))
        one_of("tokenizer_mode", self.tokenizer_mode, ("auto", "slow"))

    def _check_generation_config(self) -> None:
        """ "auto": the model's generation_config.json; "vllm": only its end tokens; or a folder."""
        value = self.generation_config
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"generation_config={value!r} must be 'auto', 'vllm' or a folder")
        self.generation_config = str(value)
        is_name = self.generation_config in ("auto", "vllm")
        if not is_name and not Path(self.generation_config).expanduser().is_dir():
            raise ValueError(
                f"generation_config={value!r} is no folder here; accepted are 'auto', 'vllm' and a "
                "folder that holds a generation_config.json"
            )
        override = self.override_generation_config
        if override is not None and not isinstance(override, dict):
            raise TypeError(f"override_generation_config={override!r} must be None or a dict")


def accepted_names() -> list[str]:
    """Every argument that `EngineArgs` takes besides `model`."""
    own = [f.name for f in fields(EngineArgs) if f.name != "model"]
    return list(dict.fromkeys([*own, *sorted(NO_EFFECT), *NEUTRAL, "limit_mm_per_prompt"]))


def engine_args_signature() -> Signature:
    """The signature that scripts inspect to see which arguments there are."""
    model = Parameter("model", Parameter.POSITIONAL_OR_KEYWORD, annotation="str")
    own = {f.name: f for f in fields(EngineArgs)}
    parameters = [model]
    for name in accepted_names():
        default = own[name].default if name in own else None
        kind = own[name].type if name in own else "object"
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    return Signature(parameters)


def check_no_media(limits: object) -> None:
    """Raises ValueError unless `limit_mm_per_prompt` allows no images, sounds and videos."""
    counts = []
    for value in limits.values() if isinstance(limits, dict) else ():
        counts.append(value.get("count") if isinstance(value, dict) else value)
    if limits is not None and (not isinstance(limits, dict) or any(count != 0 for count in counts)):
        raise ValueError(
            f"limit_mm_per_prompt={limits!r} is not supported; accepted are None and a dict whose "
            "counts are 0, because the model takes text only"
        )


class AsyncEngineArgs(EngineArgs):
    """vLLM's name for the arguments of an `AsyncLLM`."""


def check_neutral(name: str, value: object) -> None:
    """Raises ValueError unless `value` is None or a neutral value of the argument."""
    if value is not None and value not in NEUTRAL[name]:
        accepted = ", ".join(map(repr, (None, *NEUTRAL[name])))
        raise ValueError(f"{name}={value!r} is not supported; accepted: {accepted}")


def one_of(name: str, value: str | None, accepted: tuple[str | None, ...]) -> None:
    """Raises ValueError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(
            f"{name}={value!r} is not known; accepted are {', '.join(map(repr, accepted))}"
        )


def positive(name: str, value: int | None, optional: bool = False) -> None:
    """Raises TypeError or ValueError unless `value` is an int of at least 1.

    optional: whether None is accepted too.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


EngineArgs.__signature__ = engine_args_signature()  # type: ignore[attr-defined]
