"""What the argument `compilation_config` says: what is compiled, and what is recorded.

Its names are vLLM's. Knows no device: `runner/setup.py` decides what None stands for.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

# The modes of vLLM. 1 to 3 mean the same here, because our own models have one way to compile.
MODES = {"NONE": 0, "STOCK_TORCH_COMPILE": 1, "DYNAMO_TRACE_ONCE": 2, "VLLM_COMPILE": 3}
BACKENDS = ("inductor", "eager", "aot_eager")
GRAPH_MODES = ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")

# Every hand-written kernel of the GPU path.
KERNELS = frozenset(
    [
        "rms_norm",
        "add_rms_norm",
        "silu_and_mul",
        "gelu_and_mul",
        "qk_norm_rope",
        "draw",
        "filter_threshold",
        "route",
        "group_by_expert",
        "grouped_linear",
        "combine",
        "clamped_swiglu",
        "few_rows_linear",
        "swiglu_linear",
        "pdl",
    ]
)
# Kernels that run only where they are named. No GPU has measured what they bring.
ON_REQUEST = frozenset({"few_rows_linear", "swiglu_linear", "pdl"})
# vLLM's names of operations -> the kernels here that compute them. Other names in KERNELS
# stand for themselves.
VLLM_OPERATIONS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("rms_norm", "add_rms_norm"),
    "gemma_rms_norm": ("rms_norm", "add_rms_norm"),
    "rotary_embedding": ("qk_norm_rope",),
    "apply_rotary_emb": ("qk_norm_rope",),
    "swigluoai_and_mul": ("clamped_swiglu",),
    "unquantized_fused_moe": ("grouped_linear",),
    # Operations that have no kernel here.
    "layer_norm": (),
    "rms_norm_gated": (),
    "gelu": (),
    "gelu_tanh": (),
    "gelu_new": (),
    "gelu_fast": (),
    "quick_gelu": (),
    "relu2": (),
    "mul_and_silu": (),
    "silu_and_mul_with_clamp": (),
    "quant_fp8": (),
    "grouped_topk": (),
    "modular_fused_moe": (),
}

# Fields of vLLM's CompilationConfig that mean something here. `read` explains them.
MEANT = (
    "mode",
    "level",
    "backend",
    "use_inductor",
    "custom_ops",
    "cudagraph_mode",
    "use_cudagraph",
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
)
# Its other fields, old and new. They change how vLLM compiles, and no result.
NOT_MEANT = (
    "debug_dump_path",
    "cache_dir",
    "compile_cache_save_format",
    "ir_enable_torch_wrap",
    "splitting_ops",
    "compile_mm_encoder",
    "cudagraph_mm_encoder",
    "encoder_cudagraph_token_budgets",
    "encoder_cudagraph_max_vision_items_per_batch",
    "encoder_cudagraph_max_frames_per_batch",
    "cudagraph_decoder_replay",
    "decoder_replay_cudagraph_capture_sizes",
    "decoder_replay_trim_threshold",
    "compile_sizes",
    "compile_ranges_endpoints",
    "compile_ranges_split_points",
    "inductor_compile_config",
    "inductor_passes",
    "cudagraph_num_of_warmups",
    "cudagraph_copy_inputs",
    "cudagraph_specialize_lora",
    "full_cuda_graph",
    "use_inductor_graph_partition",
    "pass_config",
    "dynamic_shapes_config",
    "fast_moe_cold_start",
    "use_aot_compile",
)


@dataclass(frozen=True)
class Compilation:
    """The choices. None stands for what suits the device.

    mode: 0: torch.compile compiles nothing. 1 to 3: it compiles. backend: of
    torch.compile. custom_ops: which hand-written kernels run, see `left_out`.
    cudagraphs: whether steps are recorded. prefill_graphs: whether these include steps with
    prompts. capture_sizes: the numbers of sequences that decode graphs are recorded for.
    max_capture_size: the largest of them.
    """

    mode: int | None = None
    backend: str = "inductor"
    custom_ops: tuple[str, ...] = ()
    cudagraphs: bool | None = None
    prefill_graphs: bool = True
    capture_sizes: tuple[int, ...] | None = None
    max_capture_size: int | None = None

    @classmethod
    def read(cls, value: object) -> Compilation:
        """Reads a mode, a dict of vLLM's fields, either as JSON, or an object with these fields.

        Raises ValueError or TypeError for a mode, a field or a value that is not known.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = from_json(value)
        if isinstance(value, Mapping):
            for name in value:
                check_field(name)
            fields = value
        elif isinstance(value, int) or value is None:
            fields = {"mode": value}
        else:
            fields = {name: getattr(value, name) for name in MEANT if hasattr(value, name)}
            if not fields:
                raise TypeError(
                    f"compilation_config={value!r} must be a mode from 0 to 3, a dict, or an "
                    "object with the fields of vLLM's CompilationConfig"
                )
        return cls.of(fields)

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> Compilation:
        """The choices in vLLM's fields. None, and "" for the backend, are the defaults."""
        mode = read_mode(fields.get("mode"))
        if mode is None:
            mode = read_mode(fields.get("level"))
        backend = fields.get("backend") or "inductor"
        if fields.get("use_inductor") is False:
            backend = "eager"
        if backend not in BACKENDS:
            raise ValueError(
                f"compilation_config: backend={backend!r} is not supported; accepted are "
                f"{', '.join(map(repr, BACKENDS))}"
            )
        found = cls(
            mode=mode,
            backend=str(backend),
            custom_ops=read_operations(fields.get("custom_ops") or ()),
            cudagraphs=read_graph_mode(fields.get("cudagraph_mode")),
            prefill_graphs=records_prefill(fields.get("cudagraph_mode")),
        )
        if fields.get("use_cudagraph") is False:
            found = replace(found, cudagraphs=False)
        return found.with_sizes(
            fields.get("cudagraph_capture_sizes"), fields.get("max_cudagraph_capture_size")
        )

    def with_sizes(self, sizes: object, largest: object) -> Compilation:
        """The same, with these arguments where they are not None. No sizes: no graphs."""
        found = self
        if sizes is not None:
            capture_sizes = read_sizes(sizes)
            found = replace(found, capture_sizes=capture_sizes or None)
            if not capture_sizes:
                found = replace(found, cudagraphs=False)
        if largest is not None:
            found = replace(
                found, max_capture_size=read_size("max_cudagraph_capture_size", largest)
            )
        return found

    def eager(self) -> Compilation:
        """The same without compilation and without graphs: `enforce_eager=True`."""
        return replace(self, mode=0, cudagraphs=False)

    def left_out(self) -> frozenset[str]:
        """The hand-written kernels that do not run.

        "none" leaves out all kernels, and "all" none. Without both, ON_REQUEST is left out.
        "+name" adds a kernel, and "-name" leaves it out.
        """
        added: set[str] = set()
        removed: set[str] = set()
        if "all" not in self.custom_ops:
            removed.update(ON_REQUEST)
        for entry in self.custom_ops:
            if entry.startswith("+"):
                added.update(kernels_of(entry[1:]))
            elif entry.startswith("-"):
                removed.update(kernels_of(entry[1:]))
        if "none" in self.custom_ops:
            removed.update(KERNELS)
        return frozenset(removed - added)


def kernels_of(operation: str) -> tuple[str, ...]:
    """The kernels of a name that `custom_ops` accepts."""
    return VLLM_OPERATIONS.get(operation, (operation,))


def from_json(text: str) -> object:
    """The value of a command line. The name of a mode stands for itself."""
    if text.upper() in MODES:
        return {"mode": text}
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(
            f"compilation_config={text!r} is no JSON; accepted are a mode from 0 to 3 and a dict "
            'such as {"mode": 3}'
        ) from None
    return value


def check_field(name: object) -> None:
    """Raises ValueError unless vLLM's CompilationConfig has a field of this name."""
    known = [*MEANT, *NOT_MEANT]
    if name not in known:
        raise ValueError(
            f"compilation_config has no field {name!r}{closest(str(name), known)}; the fields with "
            f"a meaning here are {', '.join(MEANT)}"
        )


def closest(name: str, known: Iterable[str]) -> str:
    """A question for the known name that is most like `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def read_mode(value: object) -> int | None:
    """0 to 3, vLLM's name of a mode, or None."""
    if isinstance(value, str) and value.upper() in MODES:
        return MODES[value.upper()]
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value in MODES.values():
        return int(value)
    raise ValueError(
        f"compilation_config: mode={value!r} is not known; accepted are None, 0 (nothing is "
        f"compiled), 1, 2 and 3 (compiled), and vLLM's names {', '.join(MODES)}"
    )


def read_graph_mode(value: object) -> bool | None:
    """Whether vLLM's CUDAGraphMode, its name or its number asks for graphs."""
    if value is None:
        return None
    name = getattr(value, "name", value)  # of vLLM's enum
    if isinstance(name, str) and name.upper() in GRAPH_MODES:
        return name.upper() != "NONE"
    if name in (0, 1, 2) and not isinstance(name, bool):
        return name != 0
    raise ValueError(
        f"compilation_config: cudagraph_mode={value!r} is not known; accepted are None, 0, 1, 2 "
        f"and {', '.join(GRAPH_MODES)}"
    )


def records_prefill(value: object) -> bool:
    """Whether vLLM's CUDAGraphMode, if it asks for graphs, means steps with prompts too."""
    name = getattr(value, "name", value)
    return not isinstance(name, str) or name.upper() != "FULL_DECODE_ONLY"


def read_operations(value: object) -> tuple[str, ...]:
    """ "none" or "all", then "+name" and "-name": a list, or text with commas between."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, Iterable):
        raise TypeError(f"compilation_config: custom_ops={value!r} must be a list of names")
    found = tuple(str(entry).strip() for entry in value)
    known = KERNELS | VLLM_OPERATIONS.keys()
    for entry in found:
        if entry in ("none", "all"):
            continue
        name = entry[1:]
        if entry[:1] not in ("+", "-") or name not in known:
            raise ValueError(
                f"compilation_config: custom_ops holds {entry!r}; accepted are 'none', 'all', and "
                f"'+name' or '-name' of a kernel{closest(name, known)}: "
                f"{', '.join(sorted(KERNELS))}"
            )
    if "none" in found and "all" in found:
        raise ValueError(
            f"compilation_config: custom_ops={list(found)} holds both 'none' and 'all'; accepted "
            "is one of them"
        )
    return found


def read_sizes(value: object) -> tuple[int, ...]:
    """Numbers of sequences, in order."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"cudagraph_capture_sizes={value!r} must be a list of numbers of sequences")
    return tuple(sorted({read_size("cudagraph_capture_sizes", size) for size in value}))


def read_size(name: str, value: object) -> int:
    """A number of sequences. Raises TypeError or ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be a whole number of sequences")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value
