"""One rank, from its setup to ready to run: model, pages, decode graphs."""

from __future__ import annotations

from nanovllm.parallel import TensorParallel
from nanovllm.runner.memory import num_blocks, record
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.setup import Setup


def make_runner(setup: Setup, tp: TensorParallel = TensorParallel()) -> ModelRunner:
    runner = ModelRunner(setup, tp)
    try:
        runner.num_blocks = tp.minimum(num_blocks(runner), runner.device)
        runner.attention.allocate(runner.num_blocks)
        record(runner)
    except BaseException:
        runner.drop_recordings()  # the error's traceback holds the runner
        raise
    return runner
