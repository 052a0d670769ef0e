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
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ARGUMENTS = {
    "write": [_pointer, _pointer, _pointer, _int, _pointer, _pointer, _pointer, _float, _pointer],
    "attend": [_pointer, _pointer, _pointer, _pointer],
    "linear": [_pointer, _int, _pointer, _pointer, _pointer, _int, _int, _int],
    "rms_norm": [_pointer, _int, _pointer, _float, _pointer, _int, _int],
    "add_rms_norm": [_pointer, _pointer, _pointer, _float, _int, _int],
    "silu_and_mul": [_pointer, _int, _pointer, _int, _int],
    "sample": [_pointer, _int, _pointer, _pointer, _pointer, _int, _int],
}


def cpu_features() -> str:
    """What `-march=native` depends on: the instruction sets of this machine's first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def build() -> Path:
    """Compiles cpu.cpp into the user's cache unless it is there. Raises OSError or subprocess.SubprocessError."""
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = shutil.which(named[0]) if named else shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler ({named[0] if named else 'g++'}) in PATH")
    command, stat = [compiler, *named[1:], *FLAGS], os.stat(compiler)
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
def kernel(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The C function `name` for this dtype; None where there is none."""
    library = load() if dtype in DTYPES else None
    if library is None:
        return None
    function = getattr(library, f"{name}_{DTYPES[dtype]}")
    function.argtypes, function.restype = ARGUMENTS[name], None
    return function
