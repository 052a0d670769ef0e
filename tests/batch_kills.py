"""Kills `nanovllm run-batch` at random moments, and lets the last run end.

python tests/batch_kills.py NUMBER_OF_KILLS INPUT [OPTIONS OF run-batch]

The output is output.jsonl beside the input. Each run is a fork of this process, which has
imported everything and computed nothing. A run is killed at a random moment after it has
written at least one line.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

# Imported here, so that no fork has to import them.
import torch._dynamo  # noqa: F401
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

from nanovllm.batch import job  # noqa: F401
from nanovllm.cli import main

ENGINE = (
    "--dtype=float32",
    "--num-gpu-blocks-override=128",
    "--max-num-seqs=8",
    "--no-progress",
)


def start(arguments: list[str]) -> int:
    """The id of a process that runs the command."""
    process = os.fork()
    if process == 0:
        main(arguments)
        os._exit(0)
    return process


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill_after_progress(process: int, output: Path, moment: random.Random) -> bool:
    """Returns whether the process still ran."""
    before = size(output)
    while size(output) <= before:
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    time.sleep(moment.uniform(0, 0.02))
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def run() -> None:
    num_kills = int(sys.argv[1])
    source = Path(sys.argv[2])
    output = source.with_name("output.jsonl")
    arguments = ["run-batch", "-i", str(source), "-o", str(output), *ENGINE, *sys.argv[3:]]
    moment = random.Random(0)
    killed = 0
    while killed < num_kills:
        if not kill_after_progress(start(arguments), output, moment):
            break
        killed += 1
        lines = output.read_bytes().count(b"\n")
        print(f"killed after {lines} lines", file=sys.stderr)
    status = os.waitpid(start(arguments), 0)[1]
    print(f"killed {killed} times")
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    run()
