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
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("nanovllm")

SOURCE = Path(__file__).with_suffix(".cpp")
FEW_ROWS = 4  # up to so many our product is the faster one wherever it builds, of weights that are not packed too
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [f"-DFEW_ROWS={FEW_ROWS}"]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ARGUMENTS = {
    "write": [_pointer, _pointer, _pointer, _int, _pointer, _pointer, _pointer, _float, _pointer],
    "attend": [_pointer, _pointer, _pointer, _pointer],
    "linear": [_pointer, _int, _pointer, _int, _pointer, _pointer, _int, _int, _int],
    "rms_norm": [_pointer, _int, _pointer, _float, _pointer, _int, _int],
    "add_rms_norm": [_pointer, _pointer, _pointer, _float, _int, _int],
    "silu_and_mul": [_pointer, _int, _pointer, _int, _int],
    "decode": [_pointer, _pointer, _pointer, _pointer, _pointer, _pointer],
    "sample": [_pointer, _int, _pointer, _pointer, _pointer, _int, _int],
}


def cpu_features() -> str:
    """What `-march=native` depends on: the instruction sets of this machine's first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def build(again: bool = False) -> Path:
    """Compiles cpu.cpp into the user's cache unless it is there and whole; `again`: in any case.

    Raises OSError or subprocess.SubprocessError.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = shutil.which(named[0]) if named else shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler ({named[0] if named else 'g++'}) in PATH")
    command, stat = [compiler, *named[1:], *FLAGS], os.stat(compiler)
    source = SOURCE.read_text()
    key = repr((source, command, stat.st_size, stat.st_mtime, platform.machine(), cpu_features()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"
    library = cache / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not again and is_whole(library):
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
        with open(whole, "r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)  # the loader of the system reads no further than the tables say
        os.replace(whole, library)
    return library


def is_whole(library: Path) -> bool:
    """Whether a cached library ends with the SHA-256 of what comes before, as `build` leaves it.

    The system maps a library that was cut short without an error, and the process dies where a page is missing.
    """
    try:
        content = library.read_bytes()
    except OSError:  # not there, a folder, or not ours to read
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


@functools.cache
def load() -> ctypes.CDLL | None:
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
def kernel(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The C function `name` for this dtype; None where there is none."""
    library = load() if dtype in DTYPES else None
    if library is None:
        return None
    function = getattr(library, f"{name}_{DTYPES[dtype]}")
    function.argtypes, function.restype = ARGUMENTS[name], None
    return function


@functools.cache
def panel(dtype: torch.dtype) -> tuple[int, int] | None:
    """(output features of a panel, neighbours in depth) of packed weights; None where weights stay as they are.

    They do where torch's product is the faster one: with AMX, and without AVX-512 unless for 16 bits. In panels a row's
    result is the same in any company.
    """
    library, features = load() if dtype in DTYPES else None, set(cpu_features().split())
    enough = {"avx512f"} if dtype is torch.float32 else {"avx512f", "avx2"}
    if library is None or "amx_tile" in features or not features & enough:
        return None
    return library.panel_columns(), getattr(library, f"panel_depth_{DTYPES[dtype]}")()


def panels(weight: Tensor) -> Tensor | None:
    """The rows [N, K] that fill panels, as [panels, columns, K / neighbours] integers, one for so many neighbours."""
    if (sizes := panel(weight.dtype)) is None or weight.shape[1] % sizes[1] or not weight.is_contiguous():
        return None
    columns, neighbours = sizes
    units = weight.view(torch.int16 if weight.itemsize * neighbours == 2 else torch.int32)
    return units[: len(units) // columns * columns].view(-1, columns, units.shape[1])


def pack(weight: Tensor) -> bool:
    """Turns each panel of a weight [N, K] in place, as cpu.cpp's `linear` reads it; False where it stays as it is."""
    if (found := panels(weight)) is None:
        return False
    turn(found, *found.shape)
    return True


def unpack(weight: Tensor) -> None:
    found = panels(weight)
    assert found is not None
    count, columns, units = found.shape
    turn(found, count, units, columns)


def turn(panels: Tensor, count: int, rows: int, columns: int) -> None:
    library = load()
    assert library is not None
    function = library.turn_16 if panels.itemsize == 2 else library.turn_32
    function(*map(ctypes.c_int64, (panels.data_ptr(), count, rows, columns)))


def rows_of(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows [n, K] of a packed weight [N, K]."""
    found = panels(weight)
    assert found is not None
    (count, columns, units), full = found.shape, found.shape[0] * found.shape[1]
    if not full:
        return weight[ids]
    at = ids.clamp(max=full - 1)
    rows = found.view(count, units, columns)[at // columns, :, at % columns].view(weight.dtype)
    return rows if full == len(weight) else torch.where((ids < full)[:, None], rows, weight[ids])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool) -> Tensor | None:
    run = kernel("linear", x.dtype)
    if run is None or weight.dtype is not x.dtype or not weight.is_contiguous() or (len(x) > FEW_ROWS and not packed):
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, depth), cols = x.shape, weight.shape[0]
    out = x.new_empty((rows, cols))
    at = None if bias is None else bias.data_ptr()
    run(x.data_ptr(), x.stride(0), weight.data_ptr(), packed, at, out.data_ptr(), rows, cols, depth)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    run = kernel("rms_norm", x.dtype)
    if run is None or weight.dtype is not x.dtype or x.ndim != 2 or x.stride(1) != 1:
        return None
    out = x.new_empty(x.shape)
    run(x.data_ptr(), x.stride(0), weight.data_ptr(), eps, out.data_ptr(), *x.shape)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    run = kernel("add_rms_norm", x.dtype)
    if run is None or weight.dtype is not x.dtype or not (x.is_contiguous() and residual.is_contiguous()):
        return None
    run(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, *x.shape)
    return x, residual


def silu_and_mul(x: Tensor) -> Tensor | None:
    run = kernel("silu_and_mul", x.dtype)
    if run is None or x.stride(1) != 1:
        return None
    rows, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, size))
    run(x.data_ptr(), x.stride(0), out.data_ptr(), rows, size)
    return out


def draw(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor | None:
    """Rows of temperature 0 get their most likely token, the lowest id of several."""
    run = kernel("sample", logits.dtype)
    if run is None or logits.stride(1) != 1 or not (temperature.is_contiguous() and u.is_contiguous()):
        return None
    tokens = torch.empty(len(logits), dtype=torch.int64)
    pointers = (temperature.data_ptr(), u.data_ptr(), tokens.data_ptr())
    run(logits.data_ptr(), logits.stride(0), *pointers, *logits.shape)
    return tokens
