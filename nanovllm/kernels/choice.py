"""Which code computes an operation on a GPU.

There are three: a hand-written kernel, the plain definition compiled by torch.compile, or
the plain definition itself. An engine says which while it runs a step, so two engines of
one process may differ. Knows neither the operations nor the engine's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


# Kernels that run only where an engine asks for them. No GPU has measured what they bring.
ON_REQUEST = frozenset({"few_rows_linear", "swiglu_linear", "pdl"})


@dataclass(frozen=True)
class KernelChoice:
    """What an engine chose. The default runs all kernels but ON_REQUEST, and compiles nothing.

    without: names of hand-written kernels that do not run. compiles: definitions without a
    kernel run compiled. backend: of torch.compile.
    """

    without: frozenset[str] = ON_REQUEST
    compiles: bool = False
    backend: str = "inductor"


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


def compiled(definition: Callable[P, R]) -> Callable[P, R]:
    """A definition that runs compiled where the engine chose so, else as it is written.

    One compilation serves all numbers of rows. Torch compiles a size of 1 apart. Inside
    another compilation the definition is inlined.
    """
    versions: dict[str, Callable[P, R]] = {}  # backend -> the compiled definition

    @wraps(definition)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        choice = CHOICE.get()
        if not choice.compiles or torch.compiler.is_compiling():
            return definition(*args, **kwargs)
        version = versions.get(choice.backend)
        if version is None:
            version = torch.compile(
                definition, dynamic=True, fullgraph=True, backend=choice.backend
            )
            versions[choice.backend] = version
        return version(*args, **kwargs)

    return run
