"""Progress bars of tqdm, or of a callable that the user passes. Knows no engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from nanovllm.outputs import RequestOutput

Item = TypeVar("Item")
ProgressClass = Callable[..., Any]  # like the untyped tqdm.tqdm
Progress = bool | ProgressClass


class ProgressBar:
    """A bar over finished requests. It shows prompt and generated tokens per second."""

    def __init__(self, total: int, use_tqdm: Progress) -> None:
        self.start = time.perf_counter()
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.bar = None
        if use_tqdm:
            self.bar = progress_class(use_tqdm)(
                total=total, desc="Processed prompts", dynamic_ncols=True, postfix=self._speed()
            )

    def _speed(self) -> str:
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        prompt_speed = self.num_prompt_tokens / elapsed
        output_speed = self.num_generated_tokens / elapsed
        return f"est. speed input: {prompt_speed:.2f} toks/s, output: {output_speed:.2f} toks/s"

    def add(self, output: RequestOutput) -> None:
        """Counts one finished request."""
        self.num_prompt_tokens += len(output.prompt_token_ids)
        for completion in output.outputs:
            self.num_generated_tokens += len(completion.token_ids)
        if self.bar is not None:
            self.bar.postfix = self._speed()
            self.bar.update(1)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def progress_class(use_tqdm: Progress) -> ProgressClass:
    """The user's callable, or tqdm."""
    if callable(use_tqdm):
        return use_tqdm
    from tqdm.auto import tqdm

    return tqdm


def progress(items: Iterable[Item], use_tqdm: Progress, desc: str) -> Iterable[Item]:
    """The same items, with a progress bar unless `use_tqdm` is False."""
    if use_tqdm:
        return progress_class(use_tqdm)(items, desc=desc)
    return items
