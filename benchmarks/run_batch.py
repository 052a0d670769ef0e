"""Does `run-batch` cost speed or memory? Against one `generate` call on the same prompts.

    PYTHONPATH=.:tests python benchmarks/run_batch.py [NUMBER OF REQUESTS]

A tiny model, so that the work of the host counts. Interleaved rounds of each. Memory is
what the process has resident, over the first and the last tenth of the rows. In the first
round the engine's own buffers still grow, so the second counts.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny import shared_model

from nanovllm import LLM, EngineArgs, SamplingParams
from nanovllm.batch.job import Options, run_batch

SAMPLING = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}
NUM_ROUNDS = 3
PAGE = 4096  # bytes


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@contextmanager
def samples(output: Path) -> Iterator[list[tuple[int, int]]]:
    """(size of the output, resident bytes), ten times a second."""
    found: list[tuple[int, int]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            found.append((output.stat().st_size if output.exists() else 0, resident()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def generate(args: EngineArgs, prompts: list[str]) -> float:
    """Requests a second."""
    llm = LLM.from_engine_args(args)
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(**SAMPLING), use_tqdm=False)
    return len(prompts) / (time.perf_counter() - start)


def batch(args: EngineArgs, folder: Path, num_requests: int) -> float:
    """Requests a second. Prints the memory."""
    output = folder / "output.jsonl"
    options = Options(
        folder / "input.jsonl", output, args, sampling=SAMPLING, overwrite=True, shows_progress=True
    )
    with samples(output) as found:
        summary = run_batch(options)
    size = output.stat().st_size
    running = [each for each in found if 0 < each[0] < size]
    first = [memory for written, memory in running if written < size / 10]
    last = [memory for written, memory in running if written > size * 9 / 10]
    if not first or not last:
        raise SystemExit("the run was too short to sample its memory; take more requests")
    means = [sum(each) / len(each) / 2**20 for each in (first, last)]
    print(f"resident: {means[0]:.0f} MiB, then {means[1]:.0f} MiB ({means[1] / means[0] - 1:+.1%})")
    return num_requests / summary.seconds


def main() -> None:
    num_requests = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    prompts = [f"the {i} in the sea" for i in range(num_requests)]
    args = EngineArgs(shared_model()[0], dtype="float32", num_gpu_blocks_override=512)
    with TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "input.jsonl").open("w") as file:
            for i, prompt in enumerate(prompts):
                body = {"prompt": prompt}
                line = {"custom_id": f"id {i}", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        for _ in range(NUM_ROUNDS):
            found = [batch(args, folder, num_requests), generate(args, prompts)]
            print("run-batch {:.0f}, generate {:.0f} requests/s".format(*found), flush=True)


if __name__ == "__main__":
    main()
