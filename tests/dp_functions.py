"""Functions for the engines' processes. They import this file, so it imports nothing."""

from __future__ import annotations

from typing import Any


def pid(worker: Any) -> int:
    import os

    return os.getpid()


def break_next_step(worker: Any) -> None:
    runner = worker.model_runner
    launch = runner.launch

    def fail(batch: Any) -> Any:
        runner.launch = launch
        raise ArithmeticError("broken")

    runner.launch = fail


class OneStepOneToken:
    """A logits processor whose request gets the token `number of its steps`.

    The number is in no argument of `update_state`, so a copy of the object would lose it.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.cannot_be_pickled = lambda: None
        self.steps: dict[int, int] = {}  # row -> steps of its request

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        for row in batch_update.removed if batch_update else ():
            self.steps.pop(row, None)
        for row, *_ in batch_update.added if batch_update else ():
            self.steps[row] = 0
        for start, end, _ in batch_update.moved if batch_update else ():
            self.steps[end] = self.steps.pop(start)

    def apply(self, logits: Any) -> Any:
        for row, count in self.steps.items():
            logits[row] = float("-inf")
            logits[row, count] = 0
            self.steps[row] += 1
        return logits
