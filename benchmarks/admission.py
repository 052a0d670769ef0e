"""Counts steps with and without admission in groups, by the scheduler alone.

    python -m benchmarks.admission

A mixed step holds a prompt, so no decode graph can replay it. The first token of a
request is counted in steps from the step before which it arrived. Nothing is timed, so
the numbers are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanovllm.core.batch import ceil_div
from nanovllm.core.sequence import Sequence
from nanovllm.engine.scheduler import Scheduler
from nanovllm.sampling_params import SamplingParams

PAGE = 64  # tokens of a page on GPUs
STEP_TOKENS = 8192  # the default budget of a step on small GPUs


@dataclass
class Counts:
    """What a run of the scheduler came to."""

    steps: int
    mixed: int
    rows: float  # mean of a step
    first_token: np.ndarray  # [requests] steps from arrival to the first token


def run(
    lengths: np.ndarray, outputs: np.ndarray, arrivals: np.ndarray, num_rows: int, group: int
) -> Counts:
    """lengths, outputs [requests]: tokens. arrivals [requests]: steps, sorted."""
    longest = int((lengths + outputs).max())
    scheduler = Scheduler(
        num_blocks=num_rows * ceil_div(longest, PAGE),
        block_size=PAGE,
        max_model_len=longest,
        max_num_seqs=num_rows,
        max_num_batched_tokens=STEP_TOKENS,
        enable_prefix_caching=False,
        admission_group=group,
    )
    first_token = np.full(len(lengths), -1)
    added = 0
    now = 0
    steps = 0
    mixed = 0
    rows = 0
    while added < len(lengths) or scheduler.unfinished:
        while added < len(lengths) and arrivals[added] <= now:
            tokens = np.full(lengths[added], added, np.int32)
            end = int(lengths[added] + outputs[added])
            params = SamplingParams(ignore_eos=True)
            scheduler.add(Sequence(added, params, tokens, end, request_number=added))
            added += 1
        now += 1
        step = scheduler.schedule()
        if step is None:
            continue
        steps += 1
        rows += len(step.rows)
        mixed += int((step.ends - step.starts).max() > 1)
        is_first = first_token[step.seq_ids] < 0
        new = step.seq_ids[is_first]
        first_token[new] = now - arrivals[new]
        scheduler.update(step, np.full(len(step.sampled), 7))
    return Counts(steps, mixed, rows / steps, first_token)


def report(name: str, lengths: np.ndarray, outputs: np.ndarray, arrivals: np.ndarray) -> None:
    num_rows = 256
    print(f"{name}, {len(lengths)} requests, {num_rows} rows")
    for group in (1, num_rows // 16):
        counts = run(lengths, outputs, arrivals, num_rows, group)
        median, late = np.percentile(counts.first_token, (50, 99))
        print(
            f"  group {group:2}: {counts.steps} steps, {counts.mixed} mixed "
            f"({counts.mixed / counts.steps:.0%}), {counts.rows:.1f} rows a step; "
            f"first token after {median:.0f} steps (median), {late:.0f} (99th percentile)"
        )


def main() -> None:
    generator = np.random.default_rng(0)
    count = 4096
    lengths = generator.integers(100, 1025, count)
    long = generator.integers(100, 1025, count)
    short = generator.integers(16, 257, count)
    at_once = np.zeros(count, np.int64)
    report("outputs of 100 to 1,024 tokens, all at once", lengths, long, at_once)
    report("outputs of 16 to 256 tokens, all at once", lengths, short, at_once)
    for load in (0.8, 0.95, 1.05):
        rate = load * 256 / short.mean()  # requests a step
        arrivals = np.floor(np.cumsum(generator.exponential(1 / rate, count))).astype(np.int64)
        name = f"outputs of 16 to 256 tokens, arriving at {load:.0%} of what the rows can serve"
        report(name, lengths, short, arrivals)


if __name__ == "__main__":
    main()
