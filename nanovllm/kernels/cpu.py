"""The CPU twins: builds cpu.cpp on first use, binds it through ctypes and says when it is worth calling.

Every function returns None where it cannot do what is asked (no compiler, another dtype or layout) and the caller then
uses the plain definition. This file knows pointers and shapes, not models.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger("nanovllm")

SOURCE = Path(__file__).with_suffix(".cpp")
FEW_ROWS = 4  # up to so many rows memory sets the pace of a product
CALL_ARGS = 10  # the most arguments that a kernel has
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [f"-DFEW_ROWS={FEW_ROWS}", f"-DCALL_ARGS={CALL_ARGS}"]
LEVELS = {  # NANOVLLM_CPU_ISA: instructions that the kernels may use
    "native": ["-march=native"],
    "avx512": ["-march=x86-64-v4", "-mtune=native"],
    "avx2": ["-march=x86-64-v3", "-mtune=native"],
}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Arguments = ctypes.c_int64 * CALL_ARGS  # cpu.cpp's Arg: integers, addresses and the bits of float64 numbers
Kernel = Callable[[ctypes.Array[ctypes.c_int64]], None]


class Recorder(Protocol):
    """Notes the calls of kernels while a model runs, to repeat them later."""

    def call(self, kernel: Kernel, arguments: tuple[int, ...]) -> None:
        """Notes one call, after the kernel ran."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a result; its address holds for as long as the calls are repeated."""


RECORDER: ContextVar[Recorder | None] = ContextVar("RECORDER", default=None)


def cpu_features() -> str:
    """What `-march=native` depends on: the instruction sets of this machine's first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def instructions() -> list[str]:
    """The compiler's flags for the environment's NANOVLLM_CPU_ISA: by default all that this machine has."""
    level = os.environ.get("NANOVLLM_CPU_ISA", "native")
    if level not in LEVELS:
        raise ValueError(f"NANOVLLM_CPU_ISA={level!r} is not known; accepted are {', '.join(LEVELS)}")
    return LEVELS[level]


def build() -> Path:
    """Compiles cpu.cpp into the user's cache unless it is there. Raises OSError or subprocess.SubprocessError."""
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = shutil.which(named[0]) if named else shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler ({named[0] if named else 'g++'}) in PATH")
    command, stat = [compiler, *named[1:], *instructions(), *FLAGS], os.stat(compiler)
    source = SOURCE.read_text()
    key = repr((source, command, stat.st_size, stat.st_mtime, platform.machine(), cpu_features()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"
    library = cache / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    logger.info("building the CPU kernels with %s, once, into %s", compiler, cache)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # several processes may build at once: the last rename wins
        part, whole = os.path.join(folder, "cpu.o"), os.path.join(folder, "cpu.so")
        # Linked without -fopenmp: OpenMP's symbols resolve to the runtime that torch has loaded, so there is one thread pool.
        for step in ([*command, "-c", str(SOURCE), "-o", part], [compiler, *named[1:], "-shared", part, "-o", whole]):
            done = subprocess.run(step, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise OSError(f"{shlex.join(step)} failed: {done.stderr.strip()[:500] or done.returncode}")
        os.replace(whole, library)
    return library


@functools.cache
def load() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(build()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as err:
        logger.warning("the CPU runs torch's own kernels, which are slower: %s", err)
        return None


@functools.cache
def kernel(name: str, dtype: torch.dtype) -> Kernel | None:
    """The C++ function `name` for this dtype; None where there is none."""
    library = load() if dtype in DTYPES else None
    if library is None:
        return None
    function = getattr(library, f"{name}_{DTYPES[dtype]}")
    function.argtypes, function.restype = [ctypes.c_void_p], None
    return function


def call(run: Kernel, *arguments: int) -> None:
    """Runs a kernel on integers and addresses in the order of its C++ parameters. A recorder, if one is active, notes it."""
    run(Arguments(*arguments))
    if (recorder := RECORDER.get()) is not None:
        recorder.call(run, arguments)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for the result of a kernel."""
    recorder = RECORDER.get()
    return torch.empty(shape, dtype=dtype, device="cpu") if recorder is None else recorder.empty(shape, dtype)


@functools.lru_cache(maxsize=64)
def float_bits(number: float) -> int:
    """A float64 as the integer of the same bits."""
    return struct.unpack("q", struct.pack("d", number))[0]


@functools.cache
def replay_function() -> Callable[[int, int], None]:
    """replay(address of Call structures, how many): runs recorded calls in their order."""
    library = load()
    assert library is not None
    function = library.replay
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], None
    return function


# -- panels: the order in which a product reads a weight --------------------------------------------------------------


@functools.cache
def panel(dtype: torch.dtype) -> tuple[int, int] | None:
    """(output features of a panel, neighbours in depth); None where there are no kernels for this dtype."""
    library = load() if dtype in DTYPES else None
    if library is None:
        return None
    return library.panel_columns(), getattr(library, f"panel_depth_{DTYPES[dtype]}")()


def fits_panels(depth: int, dtype: torch.dtype) -> bool:
    """Whether rows of `depth` numbers can lie in panels."""
    sizes = panel(dtype)
    return sizes is not None and depth % sizes[1] == 0


def to_panels(weight: Tensor) -> None:
    """Transposes each panel of contiguous rows [N, K] in place. What fills no panel stays as it is."""
    count, columns, units = panel_shape(weight)
    transpose(weight, count, columns, units)


def to_rows(weight: Tensor) -> None:
    """Undoes `to_panels`."""
    count, columns, units = panel_shape(weight)
    transpose(weight, count, units, columns)


def panel_shape(weight: Tensor) -> tuple[int, int, int]:
    """(panels, output features of each, pairs or single numbers in depth)."""
    sizes = panel(weight.dtype)
    assert sizes is not None
    assert weight.is_contiguous()
    columns, neighbours = sizes
    return weight.shape[0] // columns, columns, weight.shape[1] // neighbours


def transpose(weight: Tensor, count: int, rows: int, columns: int) -> None:
    """Transposes the first `count` matrices [rows, columns] of a weight in place."""
    library = load()
    sizes = panel(weight.dtype)
    assert library is not None
    assert sizes is not None
    function = library.transpose_16 if weight.itemsize * sizes[1] == 2 else library.transpose_32
    function(*map(ctypes.c_int64, (weight.data_ptr(), count, rows, columns)))


# -- the operations ----------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x [T, K] @ weight [N, K].T + bias [N], of a weight in rows."""
    return product("linear", x, weight, bias)


def linear_panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The same of a weight that `to_panels` has transposed."""
    return product("linear_panels", x, weight, bias)


def product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    run = kernel(name, x.dtype)
    if run is None or weight.dtype is not x.dtype or not weight.is_contiguous():
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, depth = x.shape
    columns = weight.shape[0]
    out = empty((rows, columns), x.dtype)
    bias_address = 0 if bias is None else bias.data_ptr()
    call(run, x.data_ptr(), x.stride(0), weight.data_ptr(), bias_address, out.data_ptr(), rows, columns, depth)
    return out


def embedding(ids: Tensor, weight: Tensor) -> Tensor | None:
    """Rows ids [T] int64 of a weight [N, K] in rows -> [T, K]. An id outside the weight gives zeros."""
    return rows_of("embed", ids, weight)


def embedding_panels(ids: Tensor, weight: Tensor) -> Tensor | None:
    """The same of a weight that `to_panels` has transposed."""
    return rows_of("embed_panels", ids, weight)


def rows_of(name: str, ids: Tensor, weight: Tensor) -> Tensor | None:
    run = kernel(name, weight.dtype)
    if run is None or ids.dtype is not torch.int64 or not (ids.is_contiguous() and weight.is_contiguous()):
        return None
    out = empty((len(ids), weight.shape[1]), weight.dtype)
    call(run, ids.data_ptr(), weight.data_ptr(), out.data_ptr(), len(ids), *weight.shape)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    run = kernel("rms_norm", x.dtype)
    if run is None or weight.dtype is not x.dtype or x.ndim != 2 or x.stride(1) != 1:
        return None
    rows, size = x.shape
    out = empty((rows, size), x.dtype)
    call(run, x.data_ptr(), x.stride(0), weight.data_ptr(), float_bits(eps), out.data_ptr(), rows, size)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    run = kernel("add_rms_norm", x.dtype)
    if run is None or weight.dtype is not x.dtype or not (x.is_contiguous() and residual.is_contiguous()):
        return None
    call(run, x.data_ptr(), residual.data_ptr(), weight.data_ptr(), float_bits(eps), *x.shape)
    return x, residual


def silu_and_mul(x: Tensor) -> Tensor | None:
    run = kernel("silu_and_mul", x.dtype)
    if run is None or x.stride(1) != 1:
        return None
    rows, size = x.shape[0], x.shape[1] // 2
    out = empty((rows, size), x.dtype)
    call(run, x.data_ptr(), x.stride(0), out.data_ptr(), rows, size)
    return out


def draw(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor | None:
    """Rows of temperature 0 get their most likely token, the lowest id of several."""
    run = kernel("sample", logits.dtype)
    if run is None or logits.stride(1) != 1 or not (temperature.is_contiguous() and u.is_contiguous()):
        return None
    tokens = torch.empty(len(logits), dtype=torch.int64)
    pointers = (temperature.data_ptr(), u.data_ptr(), tokens.data_ptr())
    call(run, logits.data_ptr(), logits.stride(0), *pointers, *logits.shape)
    return tokens
