"""Steps of few tokens, recorded as programs on a CPU. On a GPU, CUDA graphs do the same.

The Python model runs once for a number of tokens, and a recorder notes every call of a
C++ kernel. Later steps of that number of tokens repeat the calls in one C loop. So the
code in models/ and layers/ is the code that runs. A model runs module by module if
anything but our kernels computes in it, or if Python must run in every step (hooks,
replaced modules).
"""

from __future__ import annotations

import ctypes
import logging
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from operator import getitem
from types import FrameType, FunctionType, ModuleType
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import kernels
from nanovllm.attention.base import AttentionBackend, zeroed
from nanovllm.kernels import blocks, cpu, moe, moe_cpu
from nanovllm.weights.base import Weight

logger = logging.getLogger("nanovllm")

# Larger steps are not recorded, because Python takes a small share of their time
# (docs/experiments.md).
MAX_TOKENS = 256
MAX_PROGRAMS = 64  # one a kind of step; the least recently used is dropped first
OURS = ("nanovllm.", "contextlib")  # modules whose functions may stand in our classes
BACKEND_METHODS = ("write", "attend", "store")
MODULE_ATTRIBUTES = set(vars(nn.Module()))  # torch's own
# Methods of nn.Module that torch.compile replaces when it first runs. No step calls them.
CONSTRUCTION = ("__init__", "__setstate__", "___needs_generation_tag_patch")


def module_code() -> dict[str, object]:
    """The methods of nn.Module that steps may call."""
    return {name: value for name, value in vars(nn.Module).items() if name not in CONSTRUCTION}


# The functions that models call, as they were when this file was imported.
NAMESPACES: list[tuple[type | ModuleType, dict[str, object]]] = [
    (namespace, dict(vars(namespace))) for namespace in (kernels, cpu, blocks, moe, moe_cpu)
]
NAMESPACES.append((nn.Module, module_code()))


# -- memory of intermediate results ------------------------------------------------------


class Arena:
    """Blocks of memory whose sizes are powers of two. All programs share the blocks.

    A block is free again when the tensor made of it and all views of the tensor are
    deleted.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, Tensor] = {}  # address -> uint8 [size]
        self.free: dict[int, list[Tensor]] = defaultdict(list)  # size -> blocks

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in a free block, or in a new one."""
        num_bytes = prod(shape) * dtype.itemsize
        size = max(64, 1 << (num_bytes - 1).bit_length())
        free = self.free[size]
        block = free.pop() if free else zeroed((size,), torch.uint8, torch.device("cpu"))
        self.blocks[block.data_ptr()] = block
        # The array is a new object. It lives as long as the tensor made of it and its
        # views.
        memory = block.numpy()
        weakref.finalize(memory, free.append, block).atexit = False
        return shaped(torch.from_numpy(memory), shape, dtype)


def shaped(block: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The first bytes of a uint8 block as a tensor."""
    return block[: prod(shape) * dtype.itemsize].view(dtype).view(shape)


# -- recording ---------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Notes the calls of kernels, and the first operation of torch that a replay would miss."""

    def __init__(self, arena: Arena, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.arena = arena
        self.names = names
        self.calls: list[tuple[int, ...]] = []  # address of the function, then its arguments
        self.kept: list[Tensor] = []  # memory that the calls use outside the arena
        self.reason: str | None = None  # why a replay of the calls would not be the whole step

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, because torch would import Dynamo at the first call, which takes over a second.

        A recorded step is never traced by Dynamo.
        """
        return False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Runs an operation of torch. A replay misses it unless it makes a view or empty memory."""
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        aliases = [each.alias_info for each in schema.returns]
        if schema.name.startswith(("aten::empty", "aten::new_empty")):
            self.kept.append(result)
        elif not all(alias is not None and not alias.is_write for alias in aliases):
            self.reason = self.reason or f"{self.caller()} calls {func}"
        return result

    def caller(self) -> str:
        """The name of the innermost module that is running."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in self.names:
                return self.names[module]
            frame = frame.f_back
        return "the model"

    def call(self, kernel: cpu.Kernel, arguments: tuple[int, ...]) -> None:
        address = ctypes.cast(kernel, ctypes.c_void_p).value  # type: ignore[arg-type]
        assert address is not None
        self.calls.append((address, *arguments))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.arena.empty(shape, dtype)


class Program:
    """The calls of one step.

    Each replay overwrites `hidden`, and so does any other program: its memory is in the
    arena.
    """

    def __init__(self, recorder: Recorder, hidden: Tensor) -> None:
        self.kept = recorder.kept
        block = recorder.arena.blocks[hidden.data_ptr()]
        self.hidden = shaped(block, tuple(hidden.shape), hidden.dtype)
        self.calls = np.zeros((len(recorder.calls), 1 + cpu.CALL_ARGS), np.int64)  # cpu.cpp's Call
        for row, call in zip(self.calls, recorder.calls):
            row[: len(call)] = call
        self.arguments = (self.calls.ctypes.data, len(self.calls))
        self.run = cpu.replay_function()

    def replay(self) -> Tensor:
        self.run(*self.arguments)
        return self.hidden


# -- what a recording relies on ----------------------------------------------------------


class Structure:
    """The Python model at one time.

    It has the modules with their attributes, parameters and hooks, and the code of their
    classes. It is kept in flat lists, because they are compared before every step.
    `reason` says why this model cannot be recorded, or is None.
    """

    def __init__(self, model: nn.Module, attention: AttentionBackend) -> None:
        self.attention = attention
        modules = list(model.modules())
        weights = [weight for module in modules for weight in weights_of(module)]
        self.modules = modules
        self.types = [type(module) for module in modules]
        self.dicts = [vars(each) for each in (*modules, *weights)]
        self.sizes = [len(attributes) for attributes in self.dicts]
        self.hooks: list[object] = [
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
        ]
        for module in modules:
            self.hooks += (module._forward_hooks, module._forward_pre_hooks)
        self.has_hooks = any(self.hooks)
        self.note_attributes(modules, weights)

        classes: set[type] = set()
        for each in (*modules, *weights, attention):
            classes.update(type(each).__mro__)
        classes.discard(object)
        owners: list[type | ModuleType] = [*classes, *(namespace for namespace, _ in NAMESPACES)]
        self.code = [vars(owner) for owner in owners if owner is not nn.Module]
        self.code_then = [dict(code) for code in self.code]
        self.module_code = module_code()
        self.backend_methods = self.changed_backend()
        self.reason = next(obstacles(model, weights, attention, classes), None)

    def note_attributes(self, modules: list[nn.Module], weights: list[Weight]) -> None:
        """Notes the address of every attribute that is a tensor, and the value of every other."""
        self.holders: list[Mapping[str, object]] = []
        self.names: list[str] = []
        self.values: list[object] = []
        self.tensor_holders: list[Mapping[str, Tensor]] = []
        self.tensor_names: list[str] = []
        self.addresses: list[int] = []
        for holder, name in attribute_places(modules, weights):
            value = holder[name]
            if isinstance(value, Tensor):
                self.tensor_holders.append(cast(Mapping[str, Tensor], holder))
                self.tensor_names.append(name)
                self.addresses.append(value.data_ptr())
            else:
                self.holders.append(holder)
                self.names.append(name)
                self.values.append(value)

    def is_unchanged(self) -> bool:
        """Whether the model is as it was. A change that no comparison expects counts as one."""
        return self.has_same_code() and self.has_same_memory()

    def has_same_memory(self) -> bool:
        """Whether every tensor lies where it lay."""
        try:
            tensors = map(getitem, self.tensor_holders, self.tensor_names)
            return list(map(Tensor.data_ptr, tensors)) == self.addresses
        except (KeyError, TypeError, RuntimeError):
            # An attribute was deleted, or is a tensor no more.
            return False

    def has_same_code(self) -> bool:
        """Whether all but the memory of tensors is as it was."""
        try:
            return (
                any(self.hooks) == self.has_hooks
                and list(map(getitem, self.holders, self.names)) == self.values
                and list(map(len, self.dicts)) == self.sizes
                and list(map(type, self.modules)) == self.types
                and self.code == self.code_then
                and module_code() == self.module_code
                and self.changed_backend() == self.backend_methods
            )
        except (KeyError, TypeError, ValueError, RuntimeError):
            # An attribute was deleted, or became a tensor.
            return False

    def changed_backend(self) -> bool:
        """Whether an instance attribute replaces a method of the attention backend."""
        return not vars(self.attention).keys().isdisjoint(BACKEND_METHODS)


def weights_of(module: nn.Module) -> Iterator[Weight]:
    """The Weight objects of a module, and the Weight objects inside them."""
    waiting: list[object] = [module]
    while waiting:
        for value in vars(waiting.pop()).values():
            if isinstance(value, Weight):
                waiting.append(value)
                yield value


def attribute_places(
    modules: list[nn.Module], weights: list[Weight]
) -> Iterator[tuple[Mapping[str, object], str]]:
    """(dictionary, key) of every attribute, parameter, buffer and child."""
    for module in modules:
        for name in vars(module):
            if name not in MODULE_ATTRIBUTES:
                yield vars(module), name
        for members in (module._modules, module._parameters, module._buffers):
            for name in members:
                yield members, name
    for weight in weights:
        for name in vars(weight):
            yield vars(weight), name


def obstacles(
    model: nn.Module, weights: list[Weight], attention: AttentionBackend, classes: set[type]
) -> Iterator[str]:
    """Why a step would do more than call kernels, as far as this shows without running a step."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        yield "there is a forward hook on all modules"
    for name, module in model.named_modules():
        shown = name or "the model"
        if module._forward_hooks or module._forward_pre_hooks:
            yield f"{shown} has a forward hook"
        if not is_ours(type(module)) and type(module) is not nn.ModuleList:
            yield f"{shown} is a {type(module).__module__}.{type(module).__qualname__}"
        if "forward" in vars(module):
            yield f"{shown} has a forward of its own"
    for weight in weights:
        if not is_ours(type(weight)):
            yield f"a weight is a {type(weight).__module__}.{type(weight).__qualname__}"
    for class_ in filter(is_ours, classes):
        for name, value in vars(class_).items():
            if is_foreign(value) or (name == "forward" and not isinstance(value, FunctionType)):
                yield f"{class_.__qualname__}.{name} was replaced"
    for namespace, before in NAMESPACES:
        for name, value in before.items():
            if vars(namespace).get(name) is not value:
                yield f"{namespace.__name__}.{name} was replaced"
    if not vars(attention).keys().isdisjoint(BACKEND_METHODS):
        yield "a method of the attention backend was replaced"


def is_ours(class_: type) -> bool:
    """Whether a class is defined in this package."""
    return class_.__module__.startswith("nanovllm.")


def is_foreign(value: object) -> bool:
    """Whether a value is a function that is defined outside this package."""
    if not isinstance(value, FunctionType):
        return False
    module: str = value.__globals__["__name__"]
    return not module.startswith(OURS)


# -- running -----------------------------------------------------------------------------


class Kind(NamedTuple):
    """Steps that one program serves: `num_tokens` of one LoRA adapter (0 is none)."""

    num_tokens: int
    adapter: int


class CpuPrograms:
    """Runs the model, with a program where there is one for this kind of step.

    Invariant: a program is replayed only if the model has not changed since its
    recording.
    """

    def __init__(self, model: nn.Module, attention: AttentionBackend) -> None:
        self.model = model
        self.attention = attention
        # Programs read the token ids at this address.
        self.input_ids = torch.zeros(MAX_TOKENS, dtype=torch.int64)
        self.reported: set[str] = set()
        self.clear()

    def clear(self) -> None:
        """Drops all programs and frees their memory."""
        self.structure: Structure | None = None
        self.arena = Arena()
        # Kinds of steps that ran. The second step of a kind is recorded.
        self.seen: set[Kind] = set()
        self.programs: OrderedDict[Kind, Program] = OrderedDict()

    def drop(self, adapter: int) -> None:
        """Drops the programs of steps with this LoRA adapter."""
        self.seen = {kind for kind in self.seen if kind.adapter != adapter}
        for kind in list(self.programs):
            if kind.adapter == adapter:
                del self.programs[kind]

    def forward(self, input_ids: Tensor, adapter: int = 0) -> Tensor:
        """input_ids [T] int64 -> hidden states [T, hidden_size]. The next step overwrites them.

        adapter: the LoRA adapter of every token; 0 is none. It never changes its memory.
        """
        structure = self.structure
        if structure is None or not structure.is_unchanged():
            self.clear()
            structure = self.structure = Structure(self.model, self.attention)
            self.report(structure.reason)
        count = len(input_ids)
        if structure.reason is not None or count > MAX_TOKENS:
            return self.model(input_ids, self.attention)
        kind = Kind(count, adapter)
        program = self.programs.get(kind)
        if program is not None:
            self.programs.move_to_end(kind)
            self.input_ids[:count] = input_ids
            return program.replay()
        if kind not in self.seen:
            self.seen.add(kind)
            return self.model(input_ids, self.attention)
        self.input_ids[:count] = input_ids
        return self.record(kind, structure)

    def record(self, kind: Kind, structure: Structure) -> Tensor:
        """Runs the model on the first tokens of `input_ids` and keeps its calls.

        A model whose calls are not the whole step is not recorded again.
        """
        names = {module: name for name, module in self.model.named_modules()}
        recorder = Recorder(self.arena, names)
        token = cpu.RECORDER.set(recorder)
        try:
            with recorder:
                hidden: Tensor = self.model(self.input_ids[: kind.num_tokens], self.attention)
        finally:
            cpu.RECORDER.reset(token)
        if recorder.reason is None and hidden.data_ptr() not in self.arena.blocks:
            recorder.reason = "what the model returns is not made by a kernel"
        if recorder.reason is not None:
            structure.reason = recorder.reason
            self.report(recorder.reason)
            return hidden
        self.programs[kind] = Program(recorder, hidden)
        if len(self.programs) > MAX_PROGRAMS:
            self.programs.popitem(last=False)
        return hidden

    def report(self, reason: str | None) -> None:
        """Warns once of each reason."""
        if reason is not None and reason not in self.reported:
            self.reported.add(reason)
            logger.warning(
                "the CPU runs this model module by module, which is slower in small steps: %s",
                reason,
            )
