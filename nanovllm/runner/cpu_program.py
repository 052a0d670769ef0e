"""Steps of few tokens recorded as programs on a CPU: the twin of CUDA graphs.

The Python model runs once for a number of tokens while a recorder notes every call of a C++ kernel. Later steps of as many
tokens repeat these calls in one C loop. What a reader sees in models/ and layers/ is thus what runs. A model in which
anything but our kernels computes, or in which Python watches (hooks, replaced modules), runs module by module.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from math import prod
from operator import getitem
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import kernels
from nanovllm.attention.base import AttentionBackend, zeroed
from nanovllm.kernels import cpu
from nanovllm.weights.base import Weight

logger = logging.getLogger("nanovllm")

MAX_TOKENS = 256  # in larger steps Python's share of the time is below one percent
MAX_PROGRAMS = 64  # one a number of tokens; the least recently used goes first
OURS = ("nanovllm.", "contextlib")  # modules whose functions may stand in our classes
BACKEND_METHODS = ("write", "attend", "store")
MODULE_ATTRIBUTES = set(vars(nn.Module()))  # torch's own
# What models call, as it was when this file was imported.
NAMESPACES: list[tuple[type | ModuleType, dict[str, Any]]] = [
    (namespace, dict(vars(namespace))) for namespace in (kernels, cpu, nn.Module)
]


# -- memory of intermediate results ------------------------------------------------------------------------------------


class Arena:
    """Blocks whose sizes are powers of two. A tensor that dies gives its block back; all programs share the blocks."""

    def __init__(self) -> None:
        self.blocks: dict[int, Tensor] = {}  # address -> uint8 [size]
        self.free: dict[int, list[Tensor]] = defaultdict(list)  # size -> blocks

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = max(64, 1 << (prod(shape) * dtype.itemsize - 1).bit_length())
        free = self.free[size]
        block = free.pop() if free else zeroed((size,), torch.uint8, torch.device("cpu"))
        self.blocks[block.data_ptr()] = block
        memory = block.numpy()  # a new array, which lives as long as the tensor made of it and that tensor's views
        weakref.finalize(memory, free.append, block).atexit = False
        return shaped(torch.from_numpy(memory), shape, dtype)


def shaped(block: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return block[: prod(shape) * dtype.itemsize].view(dtype).view(shape)


# -- recording ---------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Notes the calls of kernels, and the first operation of torch that a replay would miss."""

    def __init__(self, arena: Arena, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.arena, self.names = arena, names
        self.calls: list[tuple[int, ...]] = []  # address of the function, then its arguments
        self.kept: list[Tensor] = []  # memory that the calls use and that is not the arena's
        self.reason: str | None = None  # why the calls are not all that happened

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            self.kept.append(result)
        elif not all(each.alias_info is not None and not each.alias_info.is_write for each in returns):
            self.reason = self.reason or f"{self.caller()} calls {func}"
        return result

    def caller(self) -> str:
        """The name of the innermost module that is running."""
        frame = sys._getframe()
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in self.names:
                return self.names[module]
            frame = frame.f_back  # type: ignore[assignment]
        return "the model"

    def call(self, kernel: cpu.Kernel, arguments: tuple[int, ...]) -> None:
        address = ctypes.cast(kernel, ctypes.c_void_p).value  # type: ignore[arg-type]
        assert address is not None
        self.calls.append((address, *arguments))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.arena.empty(shape, dtype)


class Program:
    """The calls of one step. Each replay overwrites `hidden`, so it holds until the next step of any size."""

    def __init__(self, recorder: Recorder, hidden: Tensor) -> None:
        self.kept = recorder.kept
        self.hidden = shaped(recorder.arena.blocks[hidden.data_ptr()], tuple(hidden.shape), hidden.dtype)
        self.calls = np.zeros((len(recorder.calls), 1 + cpu.CALL_ARGS), np.int64)  # cpu.cpp's Call
        for row, call in zip(self.calls, recorder.calls):
            row[: len(call)] = call
        self.arguments = self.calls.ctypes.data, len(self.calls)
        self.run = cpu.replay_function()

    def replay(self) -> Tensor:
        self.run(*self.arguments)
        return self.hidden


# -- what a recording relies on ----------------------------------------------------------------------------------------


class Structure:
    """What the Python model looked like: modules, their attributes and parameters, hooks, and the code of their classes.

    Flat lists, because they are compared before every step. `reason` says why this model cannot be recorded, or is None.
    """

    def __init__(self, model: nn.Module, attention: AttentionBackend) -> None:
        self.attention = attention
        modules = list(model.modules())
        weights = [weight for module in modules for weight in weights_of(module)]
        self.modules, self.types = modules, [type(module) for module in modules]
        self.dicts = [vars(each) for each in (*modules, *weights)]
        self.sizes = [len(attributes) for attributes in self.dicts]
        self.hooks: list[Any] = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        for module in modules:
            self.hooks += (module._forward_hooks, module._forward_pre_hooks)
        self.hooked = any(self.hooks)

        places = list(attribute_places(modules, weights))
        tensors = [place for place in places if isinstance(place[0][place[1]], Tensor)]
        others = [place for place in places if not isinstance(place[0][place[1]], Tensor)]
        self.holders, self.names = [holder for holder, _ in others], [name for _, name in others]
        self.values = [holder[name] for holder, name in others]
        self.tensor_holders, self.tensor_names = [holder for holder, _ in tensors], [name for _, name in tensors]
        self.addresses = [holder[name].data_ptr() for holder, name in tensors]

        classes = {
            base for each in (*modules, *weights, attention) for base in type(each).__mro__ if base is not object
        }
        owners: list[type | ModuleType] = [*classes, *(namespace for namespace, _ in NAMESPACES)]
        self.code: list[Any] = [vars(owner) for owner in owners]
        self.code_then = [dict(code) for code in self.code]
        self.backend_methods = self.changed_backend()
        self.reason = next(obstacles(model, weights, attention, classes), None)

    def holds(self) -> bool:
        """Whether nothing has changed since. A change that no comparison expects counts as one."""
        try:
            return (
                any(self.hooks) == self.hooked
                and list(map(getitem, self.holders, self.names)) == self.values
                and list(map(Tensor.data_ptr, map(getitem, self.tensor_holders, self.tensor_names))) == self.addresses
                and list(map(len, self.dicts)) == self.sizes
                and list(map(type, self.modules)) == self.types
                and self.code == self.code_then
                and self.changed_backend() == self.backend_methods
            )
        except (KeyError, TypeError, ValueError, RuntimeError):  # an attribute is gone, or is now a tensor or no tensor
            return False

    def changed_backend(self) -> bool:
        return not vars(self.attention).keys().isdisjoint(BACKEND_METHODS)


def weights_of(module: nn.Module) -> Iterator[Weight]:
    """The Weight objects of a module, and those that they wrap."""
    waiting: list[object] = [module]
    while waiting:
        for value in vars(waiting.pop()).values():
            if isinstance(value, Weight):
                waiting.append(value)
                yield value


def attribute_places(modules: list[nn.Module], weights: list[Weight]) -> Iterator[tuple[dict[str, Any], str]]:
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
    """Why calls of kernels would not be all that a step does, as far as it can be seen without running one."""
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
            replaced = isinstance(value, FunctionType) and not value.__globals__["__name__"].startswith(OURS)
            if replaced or (name == "forward" and not isinstance(value, FunctionType)):
                yield f"{class_.__qualname__}.{name} was replaced"
    for namespace, before in NAMESPACES:
        for name, value in before.items():
            if vars(namespace).get(name) is not value:
                yield f"{namespace.__name__}.{name} was replaced"
    if not vars(attention).keys().isdisjoint(BACKEND_METHODS):
        yield "a method of the attention backend was replaced"


def is_ours(class_: type) -> bool:
    return class_.__module__.startswith("nanovllm.")


# -- running -----------------------------------------------------------------------------------------------------------


class CpuPrograms:
    """Runs the model, by a program where there is one for this number of tokens.

    Invariant: a program is replayed only while the model is what it was when the program was recorded.
    """

    def __init__(self, model: nn.Module, attention: AttentionBackend) -> None:
        self.model, self.attention = model, attention
        self.input_ids = torch.zeros(MAX_TOKENS, dtype=torch.int64)  # programs read it at this address
        self.reported: set[str] = set()
        self.clear()

    def clear(self) -> None:
        """Forgets all programs and frees their memory."""
        self.structure: Structure | None = None
        self.arena = Arena()
        self.seen: set[int] = set()  # numbers of tokens that a step had; what comes twice is recorded
        self.programs: OrderedDict[int, Program] = OrderedDict()

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [T] int64 -> hidden states [T, hidden_size], which hold until the next step."""
        structure = self.structure
        if structure is None or not structure.holds():
            self.clear()
            structure = self.structure = Structure(self.model, self.attention)
            self.report(structure.reason)
        count = len(input_ids)
        if structure.reason is not None or count > MAX_TOKENS:
            return self.model(input_ids, self.attention)
        if (program := self.programs.get(count)) is not None:
            self.programs.move_to_end(count)
            self.input_ids[:count] = input_ids
            return program.replay()
        if count not in self.seen:
            self.seen.add(count)
            return self.model(input_ids, self.attention)
        self.input_ids[:count] = input_ids
        return self.record(count, structure)

    def record(self, count: int, structure: Structure) -> Tensor:
        """Runs the model on the first `count` of `input_ids` and keeps its calls."""
        names = {module: name for name, module in self.model.named_modules()}
        recorder = Recorder(self.arena, names)
        token = cpu.RECORDER.set(recorder)
        try:
            with recorder:
                hidden: Tensor = self.model(self.input_ids[:count], self.attention)
        finally:
            cpu.RECORDER.reset(token)
        if recorder.reason is None and hidden.data_ptr() not in self.arena.blocks:
            recorder.reason = "what the model returns is not made by a kernel"
        if recorder.reason is not None:
            structure.reason = recorder.reason
            self.report(recorder.reason)
            return hidden
        self.programs[count] = Program(recorder, hidden)
        if len(self.programs) > MAX_PROGRAMS:
            self.programs.popitem(last=False)
        return hidden

    def report(self, reason: str | None) -> None:
        if reason is not None and reason not in self.reported:
            self.reported.add(reason)
            logger.warning("the CPU runs this model module by module, which is slower in small steps: %s", reason)
