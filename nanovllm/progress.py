"""Progress bars: tqdm, or a callable that the user passes in its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from nanovllm.outputs import RequestOutput

Progress = bool | Callable[..., Any]


class ProgressBar:
    """tqdm with input and output tokens per second, or whatever callable stands in for it."""

    def __init__(self, total: int, use_tqdm: Progress) -> None:
        self.bar, self.start, self.tokens_in, self.tokens_out = None, time.perf_counter(), 0, 0
        if use_tqdm:
            self.bar = tqdm_like(use_tqdm)(
                total=total, desc="Processed prompts", dynamic_ncols=True, postfix=self._speed()
            )

    def _speed(self) -> str:
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        per_second = (self.tokens_in / elapsed, self.tokens_out / elapsed)
        return "est. speed input: {:.2f} toks/s, output: {:.2f} toks/s".format(*per_second)

    def add(self, output: RequestOutput) -> None:
        self.tokens_in += len(output.prompt_token_ids)
        self.tokens_out += sum(len(completion.token_ids) for completion in output.outputs)
        if self.bar is not None:
            self.bar.postfix = self._speed()
            self.bar.update(1)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def tqdm_like(use_tqdm: Progress) -> Callable[..., Any]:
    if callable(use_tqdm):
        return use_tqdm
    from tqdm.auto import tqdm

    return tqdm


def progress(items: Iterable[Any], use_tqdm: Progress, desc: str) -> Iterable[Any]:
    return tqdm_like(use_tqdm)(items, desc=desc) if use_tqdm else items
