"""Which code computes an operation on a GPU.

There are three: a hand-written kernel, the plain definition compiled by torch.compile, or
the plain definition itself. An engine says which while it runs a step, so two engines of
one process may differ. Knows neither the operations nor the engine's arguments.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from itertools import count
from time import perf_counter
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nanovllm.compilation import ON_REQUEST

logger = logging.getLogger("nanovllm")

P = ParamSpec("P")
R = TypeVar("R")
Option = str | int | bool | Callable[..., Any]  # torch's type
COPIES = count()  # numbers the functions that `compile_copy` makes


@dataclass
class Compilations:
    """How much one engine has compiled so far."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class KernelChoice:
    """What an engine chose. The default runs all kernels but ON_REQUEST, and compiles nothing.

    without: names of hand-written kernels that do not run. compiles: definitions without a
    kernel run compiled. backend: of torch.compile. The compiled code belongs to this
    object, and is freed with it.
    """

    without: frozenset[str] = ON_REQUEST
    compiles: bool = False
    backend: str = "inductor"
    done: Compilations = field(default_factory=Compilations)


DEFAULT = KernelChoice()
CHOICE: ContextVar[KernelChoice] = ContextVar("CHOICE", default=DEFAULT)


@contextmanager
def kernel_choice(choice: KernelChoice) -> Iterator[None]:
    """Operations inside the `with` follow `choice`."""
    token = CHOICE.set(choice)
    try:
        yield
    finally:
        CHOICE.reset(token)


def has_kernel(name: str) -> bool:
    """Whether the hand-written kernel of this name may run."""
    return name not in CHOICE.get().without


def compiled(*rows: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a definition run compiled where the engine chose so, else as it is written.

    rows: the parameters, tensors or None, whose first size differs from step to step. One
    compilation serves all numbers of rows from 2 on, because torch compiles 0 and 1
    apart. All other sizes and all numbers are constants of the compiled code. Callers pass
    all arguments by position. Inside another compilation the definition is inlined.
    """

    def decorate(definition: Callable[P, R]) -> Callable[P, R]:
        names = list(inspect.signature(definition).parameters)
        places = [names.index(name) for name in rows]
        versions: WeakKeyDictionary[KernelChoice, CompiledDefinition[P, R]] = WeakKeyDictionary()

        @wraps(definition)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            # First, because torch cannot compile a read of CHOICE.
            if torch.compiler.is_compiling():
                return definition(*args, **kwargs)
            choice = CHOICE.get()
            if not choice.compiles:
                return definition(*args, **kwargs)
            version = versions.get(choice)
            if version is None:
                version = versions[choice] = CompiledDefinition(definition, choice, places)
            return version.run(*args, **kwargs)

        return run

    return decorate


class CompiledDefinition(Generic[P, R]):
    """One definition, compiled for one engine. It runs as it is written if torch fails."""

    def __init__(self, definition: Callable[P, R], choice: KernelChoice, places: list[int]) -> None:
        """places: the arguments whose first size is a number of rows."""
        self.definition = definition
        self.places = places
        self.done = choice.done
        self.code = compile_copy(definition, choice.backend)
        self.has_failed = False

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.has_failed:
            return self.definition(*args, **kwargs)
        for place in self.places:
            mark_rows(args[place])
        try:
            return call_timed(self.name, self.done, self.code, *args, **kwargs)
        except torch.OutOfMemoryError:  # no fault of the definition: the next call may compile
            logger.warning("%s runs once without torch.compile: no memory", self.name)
        except Exception as error:  # torch's compilers may raise any type
            self.has_failed = True
            logger.warning("%s runs without torch.compile, which failed: %s", self.name, error)
        # An error of the step itself is raised here again.
        return self.definition(*args, **kwargs)

    @property
    def name(self) -> str:
        return self.definition.__name__.lstrip("_")


def mark_rows(x: object) -> None:
    """Tells torch that the first size of a tensor varies."""
    if isinstance(x, Tensor) and x.shape[0] > 1:
        torch._dynamo.mark_dynamic(x, 0)


def call_timed(
    name: str, done: Compilations, code: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Calls `code`. A call that compiles is logged and added to `done`."""
    before = num_graphs()
    start = perf_counter()
    result = code(*args, **kwargs)
    if num_graphs() != before:
        seconds = perf_counter() - start
        done.count += 1
        done.seconds += seconds
        logger.info("compiled %s in %.1f seconds", name, seconds)
    return result


def num_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compile_copy(function: Callable[P, R], backend: str) -> Callable[P, R]:
    """torch.compile of a copy of the function with a code object of its own.

    Torch keeps compiled code at the code object and gives up after some versions of it. So
    engines share no versions, and the versions of an engine are freed with it. Nothing is
    dynamic but what `mark_dynamic` names. Inductor rounds where the definition does.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(COPIES)}")
    copy = FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )
    options: dict[str, Option] | None
    options = {"emulate_precision_casts": True} if backend == "inductor" else None
    return torch.compile(copy, fullgraph=True, dynamic=False, backend=backend, options=options)
