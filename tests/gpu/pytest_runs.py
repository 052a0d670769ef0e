"""Parts of the GPU check that run tests, and what pytest's output says of them.

The outcomes come from the lines that `pytest -v` prints, because these are there even if
pytest is killed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ["tests/gpu/test_gpu.py", "tests/gpu/test_gpu_choices.py"]
MEMORY = ["tests/gpu/test_gpu_memory.py"]
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
# `tests/file.py::test PASSED [ 10%]`, and with pytest-xdist `[gw0] [ 10%] PASSED tests/...`.
ALONE = re.compile(rf"(?P<test>\S+\.py::.*?) (?P<outcome>{OUTCOMES})\b.*\[ *\d+%\]$")
PARALLEL = re.compile(rf"\[gw\d+\] \[ *\d+%\] (?P<outcome>{OUTCOMES}) (?P<test>.*?) *$")
BEGUN = re.compile(r"(?P<test>\S+\.py::.*?) *$")


@dataclass
class Outcomes:
    """The tests of each outcome, and the test that was running at the end of the output."""

    tests: dict[str, list[str]] = field(default_factory=dict)
    running: str = ""

    @classmethod
    def read(cls, lines: list[str]) -> Outcomes:
        found = cls()
        for line in lines:
            match = ALONE.match(line) or PARALLEL.match(line)
            if match is not None:
                found.tests.setdefault(match["outcome"], []).append(match["test"])
        if lines and (begun := BEGUN.match(lines[-1])):
            found.running = begun["test"]
        return found

    @property
    def count(self) -> int:
        return sum(len(tests) for tests in self.tests.values())

    @property
    def failed(self) -> list[str]:
        return self.tests.get("FAILED", []) + self.tests.get("ERROR", [])

    def number(self, outcome: str) -> int:
        return len(self.tests.get(outcome, []))

    def summary(self) -> str:
        skipped = self.number("SKIPPED")
        text = f"{self.number('PASSED')} passed, {len(self.failed)} failed, {skipped} skipped"
        return text + (f", then {self.running}" if self.running else "")

    def result(self) -> dict[str, Any]:
        counts = {outcome.lower(): len(tests) for outcome, tests in self.tests.items()}
        return {"summary": self.summary(), "counts": counts, "failed": self.failed}


def run_tests(tiny: bool, *arguments: str, processes: int = 1) -> dict[str, Any]:
    """Runs the tests with the mark "gpu", in several processes if pytest-xdist is installed.

    tiny: a rehearsal, in which all tests may be skipped.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--durations=10"]
    command += ["--color=no", "-p", "no:cacheprovider"]
    if processes > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(processes)]
    lines = []
    with subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as pytest:
        assert pytest.stdout is not None
        for line in pytest.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    outcomes = Outcomes.read(lines)
    outcomes.running = ""
    some_ran = outcomes.number("PASSED") > 0
    return {**outcomes.result(), "ok": pytest.returncode == 0 and (some_ran or tiny)}


def kernel_tests(tiny: bool) -> dict[str, Any]:
    """Tests of kernels mostly compile, so several processes run them."""
    return run_tests(tiny, "tests", "--ignore=tests/gpu", processes=min(8, os.cpu_count() or 1))


def engine_tests(tiny: bool) -> dict[str, Any]:
    """Four processes, because a process compiles kernels for three minutes when none is cached."""
    return run_tests(tiny, *ENGINES, processes=4)


def memory_tests(tiny: bool) -> dict[str, Any]:
    """They measure the free memory of the GPU, so nothing else may run there."""
    return run_tests(tiny, *MEMORY)
