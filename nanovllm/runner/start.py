"""One rank, from its setup to ready to run: model, pages, decode graphs."""

from __future__ import annotations

import logging

from nanovllm.parallel import TensorParallel
from nanovllm.runner.memory import num_blocks, record
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.setup import Setup

logger = logging.getLogger("nanovllm")


def make_runner(setup: Setup, tp: TensorParallel = TensorParallel()) -> ModelRunner:
    runner = ModelRunner(setup, tp)
    try:
        runner.num_blocks = tp.minimum(num_blocks(runner), runner.device)
        runner.attention.allocate(runner.num_blocks)
        record(runner)
    except BaseException:
        runner.drop_recordings()  # the error's traceback holds the runner
        raise
    done = runner.kernel_choice.done
    if done.count:
        logger.info("compiled %d operations in %.1f seconds", done.count, done.seconds)
    return runner
