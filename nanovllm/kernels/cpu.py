"""The CPU's kernels in Python: builds cpu.cpp on first use and calls it through ctypes.

An operation returns None where its kernel cannot run: without a compiler, or for another
dtype or layout. The caller then uses the plain definition. This file knows pointers and
shapes, not models.
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
FEW_ROWS = 4  # a product of at most this many rows is bound by memory
CALL_ARGS = 10  # no kernel has more arguments
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [f"-DFEW_ROWS={FEW_ROWS}", f"-DCALL_ARGS={CALL_ARGS}"]
# The values of NANOVLLM_CPU_ISA: which instructions the kernels may use.
LEVELS = {
    "native": ["-march=native"],
    "avx512": ["-march=x86-64-v4", "-mtune=native"],
    "avx2": ["-march=x86-64-v3", "-mtune=native"],
}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# cpu.cpp's Arg: integers, addresses and the bits of float64 numbers.
Arguments = ctypes.c_int64 * CALL_ARGS
Kernel = Callable[[ctypes.Array[ctypes.c_int64]], None]


class Recorder(Protocol):
    """Notes the calls of kernels while a model runs, so that they can be repeated."""

    def call(self, kernel: Kernel, arguments: tuple[int, ...]) -> None:
        """Notes one call, after the kernel ran."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a result. It keeps its address while the calls are repeated."""


RECORDER: ContextVar[Recorder | None] = ContextVar("RECORDER", default=None)


def cpu_features() -> str:
    """The instruction sets of this machine's first core, on which `-march=native` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    for line in lines:
        if line.lower().startswith(("flags", "features")):
            return line
    return ""


def instructions() -> list[str]:
    """The compiler's flags for NANOVLLM_CPU_ISA. The default is "native".

    Raises ValueError for a value that is not in LEVELS.
    """
    level = os.environ.get("NANOVLLM_CPU_ISA", "native")
    if level not in LEVELS:
        raise ValueError(
            f"NANOVLLM_CPU_ISA={level!r} is not known; accepted are {', '.join(LEVELS)}"
        )
    return LEVELS[level]


def build(again: bool = False) -> Path:
    """Compiles cpu.cpp into the user's cache, unless a whole library is there already.

    again: compile in any case. Raises OSError or subprocess.SubprocessError.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = shutil.which(named[0]) if named else shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler ({named[0] if named else 'g++'}) in PATH")
    driver = [compiler, *named[1:]]
    command = [*driver, *instructions(), *FLAGS]
    stat = os.stat(compiler)
    source = SOURCE.read_text()
    key = repr((source, command, stat.st_size, stat.st_mtime, platform.machine(), cpu_features()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"
    library = cache / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not again and is_whole(library):
        return library
    logger.info("building the CPU kernels with %s, once, into %s", compiler, cache)
    cache.mkdir(parents=True, exist_ok=True)
    # Several processes may build at once. Each has its own folder, and the last rename
    # wins.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        part = os.path.join(folder, "cpu.o")
        whole = os.path.join(folder, "cpu.so")
        run_compiler([*command, "-c", str(SOURCE), "-o", part])
        # The link goes without -fopenmp, so that OpenMP's symbols resolve to the runtime
        # that torch has loaded. Then there is one pool of threads.
        run_compiler([*driver, "-shared", part, "-o", whole])
        with open(whole, "r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)  # the system's loader reads no further than the tables say
        os.replace(whole, library)
    return library


def run_compiler(command: list[str]) -> None:
    """Runs a compiler. Raises OSError with its message where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        message = done.stderr.strip()[:500] or done.returncode
        raise OSError(f"{shlex.join(command)} failed: {message}")


def is_whole(library: Path) -> bool:
    """Whether a cached library ends with the SHA-256 of its other bytes.

    `build` writes it.

    The check is needed because the system maps a truncated library without an error. The
    process then dies where a page is missing.
    """
    try:
        content = library.read_bytes()
    except OSError:  # not there, a folder, or not ours to read
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


@functools.cache
def load() -> ctypes.CDLL | None:
    """The built library. None, with a warning, where it cannot be built or loaded."""
    try:
        library = build()
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # it is whole, and was built for another machine
            return ctypes.CDLL(str(build(again=True)))
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
    function.argtypes = [ctypes.c_void_p]
    function.restype = None
    return function


def call(run: Kernel, *arguments: int) -> None:
    """Runs a kernel on integers and addresses, in the order of its C++ parameters.

    The active recorder, if there is one, notes the call.
    """
    run(Arguments(*arguments))
    recorder = RECORDER.get()
    if recorder is not None:
        recorder.call(run, arguments)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for the result of a kernel."""
    recorder = RECORDER.get()
    if recorder is not None:
        return recorder.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device="cpu")


@functools.lru_cache(maxsize=64)
def float_bits(number: float) -> int:
    """A float64 as the integer of the same bits."""
    return struct.unpack("q", struct.pack("d", number))[0]


@functools.cache
def replay_function() -> Callable[[int, int], None]:
    """replay(address of Call structures, number of them): runs recorded calls in their order."""
    library = load()
    assert library is not None
    function = library.replay
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function


# -- panels: the order in which a product reads a weight ---------------------------------


@functools.cache
def panel(dtype: torch.dtype) -> tuple[int, int] | None:
    """(output features of a panel, neighbours in depth).

    None where there are no kernels for this dtype.
    """
    library = load() if dtype in DTYPES else None
    if library is None:
        return None
    return library.panel_columns(), getattr(library, f"panel_depth_{DTYPES[dtype]}")()


def fits_panels(depth: int, dtype: torch.dtype) -> bool:
    """Whether rows of `depth` numbers can lie in panels."""
    sizes = panel(dtype)
    return sizes is not None and depth % sizes[1] == 0


def to_panels(weight: Tensor) -> None:
    """Transposes each panel of contiguous rows [N, K] in place.

    The last rows, too few for a panel, stay as they are.
    """
    count, columns, units = panel_shape(weight)
    transpose(weight, count, columns, units)


def to_rows(weight: Tensor) -> None:
    """Undoes `to_panels`."""
    count, columns, units = panel_shape(weight)
    transpose(weight, count, units, columns)


def panel_shape(weight: Tensor) -> tuple[int, int, int]:
    """(number of panels, output features of a panel, groups of neighbours in depth)."""
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
    neighbours_bytes = weight.itemsize * sizes[1]
    function = library.transpose_16 if neighbours_bytes == 2 else library.transpose_32
    function(*map(ctypes.c_int64, (weight.data_ptr(), count, rows, columns)))


# -- the operations ----------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x [T, K] @ weight [N, K].T + bias [N] -> [T, N], of a weight in rows."""
    return product("linear", x, weight, bias)


def linear_panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The same product, of a weight that `to_panels` has transposed."""
    return product("linear_panels", x, weight, bias)


def product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The product by the kernel `name`."""
    run = kernel(name, x.dtype)
    if run is None or weight.dtype is not x.dtype or not weight.is_contiguous():
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, depth = x.shape
    columns = weight.shape[0]
    out = empty((rows, columns), x.dtype)
    bias_address = 0 if bias is None else bias.data_ptr()
    call(
        run,
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        bias_address,
        out.data_ptr(),
        rows,
        columns,
        depth,
    )
    return out


def embedding(ids: Tensor, weight: Tensor) -> Tensor | None:
    """Rows ids [T] int64 of a weight [N, K] in rows -> [T, K].

    An id outside the weight gives zeros.
    """
    return rows_of("embed", ids, weight)


def embedding_panels(ids: Tensor, weight: Tensor) -> Tensor | None:
    """The same rows, of a weight that `to_panels` has transposed."""
    return rows_of("embed_panels", ids, weight)


def rows_of(name: str, ids: Tensor, weight: Tensor) -> Tensor | None:
    """Rows by the kernel `name`."""
    run = kernel(name, weight.dtype)
    if run is None or ids.dtype is not torch.int64:
        return None
    if not (ids.is_contiguous() and weight.is_contiguous()):
        return None
    out = empty((len(ids), weight.shape[1]), weight.dtype)
    call(run, ids.data_ptr(), weight.data_ptr(), out.data_ptr(), len(ids), *weight.shape)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """x [T, size], weight [size] -> [T, size]."""
    run = kernel("rms_norm", x.dtype)
    if run is None or weight.dtype is not x.dtype or x.ndim != 2 or x.stride(1) != 1:
        return None
    out = empty((x.shape[0], x.shape[1]), x.dtype)
    weight_and_eps = (weight.data_ptr(), float_bits(eps))
    call(run, x.data_ptr(), x.stride(0), *weight_and_eps, out.data_ptr(), *x.shape)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor] | None:
    """Norms residual + x, both [T, size]. Overwrites x with the norm and residual with the sum."""
    run = kernel("add_rms_norm", x.dtype)
    if run is None or weight.dtype is not x.dtype:
        return None
    if not (x.is_contiguous() and residual.is_contiguous()):
        return None
    call(run, x.data_ptr(), residual.data_ptr(), weight.data_ptr(), float_bits(eps), *x.shape)
    return x, residual


def silu_and_mul(x: Tensor) -> Tensor | None:
    """[T, 2I] -> [T, I]."""
    run = kernel("silu_and_mul", x.dtype)
    if run is None or x.stride(1) != 1:
        return None
    rows, size = x.shape[0], x.shape[1] // 2
    out = empty((rows, size), x.dtype)
    call(run, x.data_ptr(), x.stride(0), out.data_ptr(), rows, size)
    return out


def draw(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor | None:
    """logits [R, V], temperature and u [R] float32 -> ids [R] int64.

    A row of temperature 0 gets its most likely token. The lowest id wins a tie.
    """
    run = kernel("sample", logits.dtype)
    if run is None or logits.stride(1) != 1:
        return None
    if not (temperature.is_contiguous() and u.is_contiguous()):
        return None
    tokens = torch.empty(len(logits), dtype=torch.int64)
    pointers = (temperature.data_ptr(), u.data_ptr(), tokens.data_ptr())
    call(run, logits.data_ptr(), logits.stride(0), *pointers, *logits.shape)
    return tokens
