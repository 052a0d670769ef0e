"""vLLM's asynchronous API: coroutines share one engine, which one thread runs.

A coroutine never calls the engine. It sends functions to the thread, which calls them
between two steps. Outputs come back in one message for each step and event loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

import torch

from nanovllm import control
from nanovllm.compat import NO_POOLING
from nanovllm.config import EngineArgs, one_of
from nanovllm.core.request import Request
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ValidationError
from nanovllm.llm import make_engine
from nanovllm.lora.request import LoRARequest
from nanovllm.outputs import RequestOutput
from nanovllm.runner.executor import EngineDeadError
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")
Item = RequestOutput | Exception

CLOSED = "this AsyncLLM was shut down"


class AsyncLLM:
    """An engine for coroutines. Several threads may share it, each with its own event loop.

    Closing an iterator of `generate` aborts its request, and so does cancelling the task.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._thread = EngineThread(engine)
        self._shutdown = weakref.finalize(self, EngineThread.close, self._thread)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **_: object) -> AsyncLLM:
        """Loads the model. Further arguments of vLLM have no effect."""
        return cls(make_engine(engine_args))

    # -- requests ----------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: object,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: Mapping[str, object] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: object = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: Mapping[str, object] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the request's outputs, as `output_kind` of the parameters says.

        CUMULATIVE: all text so far; a slow reader gets only the newest output. DELTA: the
        new text. FINAL_ONLY: one output. Raises ValueError or TypeError for a refused
        request, EngineDeadError if the engine is dead, and RuntimeError if a step failed.
        lora_request and the arguments above it have the meaning of `LLM.generate`. The
        arguments below priority, and trace_headers, have no effect.
        """
        if prompt_text is not None and not isinstance(prompt, Mapping):
            prompt = {"prompt": prompt_text, "prompt_token_ids": prompt}
        kind = getattr(sampling_params, "output_kind", None)
        # Cumulative outputs show all completions, so the newest one holds all others.
        newest_only = kind is RequestOutputKind.CUMULATIVE
        outputs = AsyncOutputs(request_id, self._thread, newest_only)
        try:
            await self._call(
                add_request,
                prompt,
                sampling_params,
                outputs,
                tokenization_kwargs,
                priority,
                lora_request,
            )
            while not outputs.finished:
                yield await outputs.get()
        finally:
            if not outputs.finished:
                self._thread.send(end_request, outputs)

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Ends requests. The last output of each has finish_reason "abort".

        internal: no effect, because a request has one id.
        """
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        await self._call(abort_requests, ids)

    async def encode(self, *_: object, **__: object) -> NoReturn:
        raise ValidationError(f"encode is not supported: {NO_POOLING}")

    async def _call(self, function: Callable[..., Result], *args: object) -> Result:
        """Calls `function(engine, *args)` between two steps."""
        return await asyncio.wrap_future(self._thread.send(function, *args))

    # -- the engine's state ------------------------------------------------------------------------

    @property
    def model_config(self) -> SimpleNamespace:
        """Facts that clients of vLLM read, such as max_model_len and hf_config."""
        return self.engine.model_config

    async def get_model_config(self) -> SimpleNamespace:
        return self.engine.model_config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.engine.tokenizer

    def get_num_unfinished_requests(self) -> int:
        return self.engine.get_num_unfinished_requests()

    async def get_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The engine's Hugging Face tokenizer. None with skip_tokenizer_init."""
        return self.engine.tokenizer

    @property
    def is_running(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.failure is None

    @property
    def is_stopped(self) -> bool:
        return not self.is_running

    @property
    def errored(self) -> bool:
        return not self.is_running

    @property
    def dead_error(self) -> BaseException:
        """The error that requests would get now."""
        return EngineDeadError(self._thread.failure)

    async def check_health(self) -> None:
        """Raises EngineDeadError unless the engine takes requests."""
        if self.errored:
            raise self.dead_error

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Unregisters all cached prefixes. Running requests go on.

        reset_connector: no effect. Raises ValueError for reset_running_requests while
        requests are unfinished.
        """
        return await self._call(lambda engine: engine.reset_prefix_cache(reset_running_requests))

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Frees the KV cache and the weights' device memory.

        level: 1 moves the weights to host memory, 2 drops them.
        mode: "abort" ends unfinished requests; "wait" and "keep" refuse to sleep then.
        """
        one_of("mode", mode, ("abort", "wait", "keep"))
        await self._call(sleep, level, mode)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Undoes `sleep`. tags: "weights", "kv_cache" or both. None stands for both."""
        await self._call(control.wake_up, tags)

    async def is_sleeping(self) -> bool:
        return bool(self.engine.freed)

    async def collective_rpc(
        self,
        method: str | Callable[..., object],
        timeout: float | None = None,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> list[object]:
        """`method(worker, ...)`, or the worker's method of that name, on each rank.

        timeout: no effect.
        """
        return await self._call(lambda engine: engine.collective_rpc(method, timeout, args, kwargs))

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Loads an adapter before a request needs it. Returns True."""
        return await self._call(lambda engine: engine.add_lora(lora_request))

    async def remove_lora(self, lora_id: int) -> bool:
        """Forgets an adapter. Returns whether it was known."""
        return await self._call(lambda engine: engine.remove_lora(lora_id))

    async def list_loras(self) -> set[int]:
        """The lora_int_id of every adapter in memory."""
        return await self._call(lambda engine: engine.list_loras())

    async def pin_lora(self, lora_id: int) -> bool:
        """Keeps an adapter in memory until `remove_lora`. Returns True."""
        return await self._call(lambda engine: engine.pin_lora(lora_id))

    def shutdown(self, timeout: float | None = None) -> None:
        """Ends the engine. Unfinished requests get EngineDeadError. timeout: no effect."""
        self._shutdown()


AsyncLLMEngine = AsyncLLM


# -- between coroutines and the thread -------------------------------------------------------------


class AsyncOutputs:
    """The outputs of one request.

    The engine's thread calls `append`, and the event loop calls all other methods.
    """

    def __init__(self, request_id: str, thread: EngineThread, newest_only: bool) -> None:
        self.request_id = request_id
        self.thread = thread
        self.loop = asyncio.get_running_loop()
        self.newest_only = newest_only  # a new output replaces the unread ones
        self.is_complete = False  # the engine's thread has sent the last item
        self.finished = False  # the last item was read
        self._items: deque[Item] = deque()
        self._ready = asyncio.Event()

    def append(self, item: Item, /) -> None:
        """Sends the item to the event loop after the step. Nothing follows the last item."""
        if self.is_complete:  # an error of a step that already ended the request
            return
        self.is_complete = isinstance(item, Exception) or item.finished
        self.thread.undelivered.setdefault(self.loop, []).append((self, item))

    def put(self, item: Item) -> None:
        if self.newest_only:
            self._items.clear()
        self._items.append(item)
        self._ready.set()

    async def get(self) -> RequestOutput:
        """Waits for the next output. Raises the exception that ended the request."""
        while not self._items:
            self._ready.clear()
            await self._ready.wait()
        item = self._items.popleft()
        self.finished = isinstance(item, Exception) or item.finished
        if isinstance(item, Exception):
            raise item
        return item


def deliver(items: list[tuple[AsyncOutputs, Item]]) -> None:
    """Runs in the event loop."""
    for outputs, item in items:
        outputs.put(item)


# -- in the engine's thread ------------------------------------------------------------------------


def add_request(
    engine: LLMEngine,
    prompt: object,
    params: SamplingParams,
    outputs: AsyncOutputs,
    tokenization_kwargs: Mapping[str, object] | None,
    priority: int,
    lora_request: LoRARequest | None,
) -> None:
    engine.add_request(
        outputs.request_id,
        prompt,
        params,
        queue=outputs,
        priority=priority,
        lora_request=lora_request,
        tokenization_kwargs=tokenization_kwargs,
    )


def end_request(engine: LLMEngine, outputs: AsyncOutputs) -> None:
    """Ends the request of these outputs. Another request may have its id by now."""
    request = engine.output_processor.requests.get(outputs.request_id)
    if request is not None and request.queue is outputs:
        engine.abort_request(outputs.request_id)


def abort_requests(engine: LLMEngine, request_ids: list[str] | None) -> None:
    """Ends requests, and sends each its last output. None stands for all requests."""
    requests = engine.output_processor.requests
    for request_id in list(requests) if request_ids is None else request_ids:
        request = requests.get(request_id)
        output = engine.end_request(request_id)
        if request is not None and request.queue is not None and output is not None:
            request.queue.append(output)


def sleep(engine: LLMEngine, level: int, mode: str) -> None:
    """One function, so that no request comes between the aborts and the sleep."""
    if mode == "abort":
        abort_requests(engine, None)
    control.sleep(engine, level)


def fail(requests: Iterable[Request], error: Exception) -> None:
    """Sends the error to the requests' coroutines."""
    for request in requests:
        if isinstance(request.queue, AsyncOutputs):
            request.queue.append(error)


class Command(Generic[Result]):
    """A function for the engine's thread, and the future of its result."""

    def __init__(self, function: Callable[..., Result], args: tuple[object, ...]) -> None:
        self.function = function
        self.args = args
        self.future: Future[Result] = Future()

    def run(self, engine: LLMEngine) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function(engine, *self.args))
        except Exception as error:
            self.future.set_exception(error)


class EngineThread:
    """Runs an engine. Invariant: only the thread calls it; `failure` says why it ended."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.failure: str | None = None
        self.undelivered: dict[asyncio.AbstractEventLoop, list[tuple[AsyncOutputs, Item]]] = {}
        self._commands: queue.SimpleQueue[Command[object] | None] = queue.SimpleQueue()
        self._sending = threading.Lock()  # a command is sent before the end, or refused
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="nanovllm engine", daemon=True)
        self._thread.start()

    def send(self, function: Callable[..., Result], *args: object) -> Future[Result]:
        """Queues `function(engine, *args)`. After the end the future has EngineDeadError."""
        command = Command(function, args)
        with self._sending:
            if self.failure is None:
                self._commands.put(command)  # type: ignore[arg-type]
                return command.future
        command.future.set_exception(EngineDeadError(self.failure))
        return command.future

    def close(self) -> None:
        """Ends the thread and the engine's ranks. Waits for the step that runs."""
        self._commands.put(None)
        if threading.current_thread() is not self._thread:  # a garbage collection may run there
            self._thread.join()
        self.engine.close()

    def _run(self) -> None:
        # Both are facts of a thread.
        torch.set_num_threads(self._num_threads)
        device = self.engine.setup.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        while self.failure is None:
            self._run_commands()
            if self.failure is None and self.engine.has_unfinished_requests():
                self._step()
            self._deliver()

    def _run_commands(self) -> None:
        """Runs all queued commands. Waits for one if no request is unfinished."""
        is_idle = not self.engine.has_unfinished_requests()
        while True:
            try:
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                return
            if command is None:
                self._end(CLOSED)
                return
            command.run(self.engine)
            is_idle = False

    def _step(self) -> None:
        requests = list(self.engine.output_processor.requests.values())
        try:
            self.engine.run_step()
        except EngineDeadError as error:
            fail(requests, error)
            self._end(str(error))
        except Exception as error:  # the engine dropped all requests, and goes on
            failure = RuntimeError(
                f"a step failed, and ended all requests in the engine: {error!r}"
            )
            failure.__cause__ = error
            fail(requests, failure)

    def _end(self, failure: str) -> None:
        """Refuses all commands, and ends the unfinished requests with EngineDeadError."""
        with self._sending:
            self.failure = failure
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None and command.future.set_running_or_notify_cancel():
                command.future.set_exception(EngineDeadError(failure))
        fail(self.engine.output_processor.requests.values(), EngineDeadError(failure))
        self.engine.abort_request(list(self.engine.output_processor.requests))

    def _deliver(self) -> None:
        """One message to each event loop that has outputs."""
        for loop, items in self.undelivered.items():
            try:
                loop.call_soon_threadsafe(deliver, items)
            except RuntimeError:  # the loop is closed, so no coroutine reads these outputs
                for outputs, _ in items:
                    end_request(self.engine, outputs)
        self.undelivered.clear()
