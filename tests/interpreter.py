"""Runs tests of Triton kernels under Triton's interpreter, on a CPU.

Triton decides when it is imported whether it interprets. So such tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # in this process


def numbers(text: str) -> tuple[int, ...]:
    """The major and the minor version."""
    return tuple(map(int, text.split(".")[:2]))


def why_not() -> str:
    """Why the installed Triton cannot interpret; "" where it can."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        return "no triton for this platform"
    if numbers(triton) < (3, 7) and numbers(np.__version__) >= (2, 4):
        return f"the interpreter of triton {triton} needs numpy < 2.4, not {np.__version__}"
    return ""


starts_interpreter = pytest.mark.skipif(
    INTERPRETED or why_not() != "", reason=why_not() or "this process interprets"
)


def run_interpreted(file: str, *arguments: str) -> str:
    """Runs the tests of `file` in a process that interprets. Returns what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-p", "no:xdist", *arguments], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout
