"""Builds the C++ kernels on first use, and loads them.

A source is compiled for this machine, once, into the user's cache. Knows no kernel.
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
from pathlib import Path

logger = logging.getLogger("nanovllm")

HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FEW_ROWS = 4  # a product of at most this many rows is bound by memory
CALL_ARGS = 12  # no kernel has more arguments
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [f"-DFEW_ROWS={FEW_ROWS}", f"-DCALL_ARGS={CALL_ARGS}"]
# The values of NANOVLLM_CPU_ISA: which instructions the kernels may use.
LEVELS = {
    "native": ["-march=native"],
    "avx512": ["-march=x86-64-v4", "-mtune=native"],
    "avxvnni": ["-march=x86-64-v3", "-mavxvnni", "-mtune=native"],
    "avx2": ["-march=x86-64-v3", "-mtune=native"],
    "portable": ["-mtune=native"],
}


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


def build(source: Path, again: bool = False) -> Path:
    """Compiles a source into the user's cache, unless a whole library is there already.

    again: compile in any case. Raises OSError or subprocess.SubprocessError.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = shutil.which(named[0]) if named else shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler ({named[0] if named else 'g++'}) in PATH")
    driver = [compiler, *named[1:]]
    command = [*driver, *instructions(), *FLAGS]
    stat = os.stat(compiler)
    text = "".join(path.read_text() for path in (source, *HEADERS))
    key = repr((text, command, stat.st_size, stat.st_mtime, platform.machine(), cpu_features()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"
    library = cache / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not again and is_whole(library):
        return library
    logger.info("building %s with %s, once, into %s", source.name, compiler, cache)
    cache.mkdir(parents=True, exist_ok=True)
    # Several processes may build at once. Each has its own folder, and the last rename
    # wins.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        part = os.path.join(folder, "kernels.o")
        whole = os.path.join(folder, "kernels.so")
        run_compiler([*command, "-c", str(source), "-o", part])
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
def load(source: Path) -> ctypes.CDLL | None:
    """The built library. None, with a warning, where it cannot be built or loaded."""
    try:
        library = build(source)
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # it is whole, and was built for another machine
            return ctypes.CDLL(str(build(source, again=True)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as err:
        logger.warning("the CPU runs torch's own kernels, which are slower: %s", err)
        return None
