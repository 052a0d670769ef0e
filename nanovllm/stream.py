"""An iterator over the outputs of some requests of one engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.lora.request import LoRARequest
from nanovllm.outputs import RequestOutput
from nanovllm.progress import Progress, progress
from nanovllm.sampling_params import RequestOutputKind, SamplingParams


class Stream:
    """Invariant: when the iteration ends, by exhaustion, error or `close`, no request is left."""

    def __init__(
        self,
        engine: LLMEngine,
        requests: list[tuple[object, SamplingParams]],
        use_tqdm: Progress = False,
        max_logprobs: int | None = None,
        output_kind: RequestOutputKind | None = None,
        priorities: Sequence[int] | None = None,
        lora_requests: Sequence[LoRARequest | None] = (),
    ) -> None:
        """lora_requests: the adapter of each request. () stands for no adapters."""
        self.request_ids: list[str] = []
        self._engine = engine
        self._open: set[str] = set()  # requests that have not brought their last output
        self._queue: deque[RequestOutput] = deque()
        try:
            adapters = iter(lora_requests or [None] * len(requests))
            for prompt, params in progress(requests, use_tqdm, "Adding requests"):
                priority = priorities[len(self.request_ids)] if priorities else 0
                with engine.exclusive():
                    request_id = engine.new_request_id()
                    self._open.add(request_id)  # before the request, because Ctrl-C may come
                    engine.add_request(
                        request_id,
                        prompt,
                        params,
                        max_logprobs=max_logprobs,
                        output_kind=output_kind,
                        queue=self._queue,
                        priority=priority,
                        lora_request=next(adapters),
                    )
                self.request_ids.append(request_id)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> RequestOutput:
        try:
            while self._open:
                if self._queue:
                    output = self._queue.popleft()
                    if output.finished:
                        self._open.remove(output.request_id)
                    return output
                with self._engine.exclusive():
                    # A step of another thread may have brought an output in the meantime.
                    if not self._queue:
                        self._check_none_is_lost()
                        self._engine.run_step()
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def _check_none_is_lost(self) -> None:
        lost = {each for each in self._open if not self._engine.has_request(each)}
        if lost:
            ids = ", ".join(sorted(lost))
            raise RuntimeError(f"requests {ids} were aborted, or dropped by a failed step")

    def close(self) -> None:
        """Aborts the requests that are unfinished and frees their blocks."""
        self._engine.abort_request(list(self._open))
        self._open.clear()

    def __del__(self) -> None:
        self.close()
