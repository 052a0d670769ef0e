"""Data parallelism: one queue over several engines, each in a process of its own.

This process checks requests, gives each to an engine, and passes outputs on. The
processes start and end as the ranks of tensor parallelism do (runner/ranks.py).
"""

from __future__ import annotations

import itertools
import pickle
import queue
import sys
import threading
import time
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import NoReturn, TypeVar, cast

import numpy as np
import torch
import xxhash

from nanovllm.adapters_of_engines import AdaptersOfEngines
from nanovllm.config import EngineArgs
from nanovllm.core import sequence as core
from nanovllm.core.adapter import Adapter
from nanovllm.core.request import Request
from nanovllm.engine.detokenizer import Tokenizer
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.output_processor import request_output
from nanovllm.engine.stats import Metric
from nanovllm.models.config import check_shards
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.runner import ranks
from nanovllm.runner.executor import EngineDeadError
from nanovllm.runner.ranks import (
    GRACE,
    REPLY,
    REPORT,
    STOP,
    Workers,
    end_with,
    uninterrupted,
    unpickle,
    user_script,
)
from nanovllm.sampling.sampler import ENGINE_PROCESSORS

START = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "import sys; sys.path[:] = {path!r}; "
    "from nanovllm.data_parallel import run_engine; run_engine({rank}, {connection})"
)
NO_PROGRESS = -1  # engines share no memory in which they note their steps
POLL = 0.05  # seconds for which one thread waits for an output before others get their turn
MAX_PREFIXES = 1 << 16  # prefixes whose engines are remembered
ENGINE = 0  # the number of this process's engine; `run_engine` sets it

Result = TypeVar("Result")


# -- messages --------------------------------------------------------------------------------------


@dataclass
class Start:
    """The first message to an engine's process."""

    args: EngineArgs
    script: dict[str, object]  # the user's script, for functions that are defined in it


@dataclass
class Add:
    """New requests: number -> the pickled `Request`.

    Their ids are the numbers, because a user may use an id twice.
    """

    requests: dict[str, bytes]
    longest_first: bool


@dataclass
class End:
    """Abort these requests."""

    numbers: list[str]


@dataclass
class Reset:
    """Drop all requests and the prefix cache. `era`: how often this has been asked."""

    era: int


@dataclass
class Call:
    """Call `function(engine, *args)`, and send an `Answer` of the same number."""

    number: int
    work: bytes  # the pickled (function, args)


@dataclass
class Answer:
    number: int
    engine: int
    value: object
    error: Exception | None = None


@dataclass
class Failed:
    """A step raised, and the engine has dropped its requests of this era."""

    error: Exception
    era: int


@dataclass
class Refused:
    """The engine's process could not read a request."""

    number: str
    sentence: str


# -- which engine gets a request -------------------------------------------------------------------


class Placement:
    """Chooses an engine for each request.

    Requests with a common prefix go to one engine, because its cache has the prefix.
    Others go to the engine with the least work. An engine with much more work than
    another gets no request for the sake of a prefix: the other computes the prefix too.

    work: tokens that the unfinished requests of each engine have and may generate.
    """

    def __init__(self, num_engines: int, block_size: int, max_lead: int) -> None:
        self.work = [0] * num_engines
        self.block_size = block_size
        self.max_lead = max_lead  # tokens of work
        self._engines_of: OrderedDict[int, set[int]] = OrderedDict()  # by the hash of a prefix

    def choose(self, token_ids: Sequence[int], hash_seed: int = 0) -> int:
        """The number of the engine, from 0.

        hash_seed: of the sequence. Prompts of different adapters share no prefix.
        """
        hashes = list(self._hashes(token_ids, hash_seed))
        chosen = self._least(range(len(self.work)))
        known = next((each for each in reversed(hashes) if each in self._engines_of), None)
        if known is not None:
            nearest = self._least(self._engines_of[known])
            if self.work[nearest] <= self.work[chosen] + self.max_lead:
                chosen = nearest
        for each in hashes:
            self._engines_of.setdefault(each, set()).add(chosen)
            self._engines_of.move_to_end(each)
        while len(self._engines_of) > MAX_PREFIXES:
            self._engines_of.popitem(last=False)
        return chosen

    def clear(self) -> None:
        """The engines' caches are empty."""
        self._engines_of.clear()

    def _least(self, engines: Iterable[int]) -> int:
        return min(engines, key=lambda engine: (self.work[engine], engine))

    def _hashes(self, token_ids: Sequence[int], hash_seed: int) -> Iterable[int]:
        """Hashes of the first 1, 2, 4, 8, ... full blocks."""
        tokens = np.asarray(token_ids, np.int32)
        length = self.block_size
        while length <= len(tokens):
            yield xxhash.xxh3_64_intdigest(tokens[:length].tobytes(), hash_seed)
            length *= 2


@dataclass
class Placed:
    """An unfinished request and its engine. `work`: its share of `Placement.work`."""

    request: Request
    engine: int
    work: int


# -- this process ----------------------------------------------------------------------------------


class DataParallelEngine(LLMEngine):
    """Looks like one engine. Results are equal to one engine's.

    Invariant: an unfinished request is in `placed`, and in `unsent` until a step sends it.
    """

    workers: Workers | None = None

    def load(self) -> None:
        """Starts the processes, and waits until all engines are loaded."""
        if ENGINE:
            raise RuntimeError(
                f"engine {ENGINE} ran the user's script to find a function, and the script makes "
                "an engine: put the engine under `if __name__ == '__main__':`, or the function "
                "into a file of its own"
            )
        starts = self._starts()
        self.size = len(starts)
        is_cpu = self.setup.device.type == "cpu"
        threads = max(1, torch.get_num_threads() // self.size) if is_cpu else 0
        self.placement = Placement(
            self.size, self.setup.block_size, self.setup.max_num_batched_tokens
        )
        self.placed: dict[str, Placed] = {}  # by the number of the request
        self.unsent: list[dict[str, bytes]] = [{} for _ in starts]  # pickled
        self.era = 0  # how often all requests were dropped
        self.longest_first = False
        self.call_numbers = itertools.count(1)
        self.answers: list[Answer] = []  # to the call that waits, whose number is `call_number`
        self.call_number = 0
        self.freed_tags: set[str] = set()
        self.workers = Workers(self.size + 1, [], NO_PROGRESS, threads, START, "engine")
        self.close_once = weakref.finalize(self, self.workers.close)
        if self.args.enable_lora:
            self.adapters = AdaptersOfEngines(self._call, self._adapters_in_use, self.args)
        try:
            for engine, start in enumerate(starts):
                self._send(engine, start)
            self._wait_for_answers(self.size)
        except BaseException:
            self.close()
            raise

    def _starts(self) -> list[bytes]:
        """The first message to each engine. Raises ValueError if they cannot run here."""
        args = self.args
        ranks = args.tensor_parallel_size
        check_shards(self.setup.config, ranks)
        if args.distributed_executor_backend not in (None, "mp"):
            raise ValueError(
                f"distributed_executor_backend={args.distributed_executor_backend!r} is not "
                f"supported with data_parallel_size={args.data_parallel_size}; accepted are None "
                "and 'mp'"
            )
        device = self.setup.device
        first = device.index or 0
        needed = first + args.data_parallel_size * ranks
        if device.type == "cuda" and needed > torch.cuda.device_count():
            raise ValueError(
                f"data_parallel_size={args.data_parallel_size} with tensor_parallel_size={ranks} "
                f"needs {needed} GPUs, and there are {torch.cuda.device_count()}; accepted is at "
                "most that, or device='cpu'"
            )
        starts = []
        for engine in range(args.data_parallel_size):
            own = replace(args, data_parallel_size=1, device=str(device))
            if device.type == "cuda":
                own.device = f"cuda:{first + engine * ranks}"
            starts.append(packed(Start(own, user_script()), "an argument of LLM"))
        return starts

    # -- requests ----------------------------------------------------------------------------------

    def enqueue(self, request: Request) -> None:
        """Chooses the request's engine. The next step sends the request there.

        Raises TypeError for a request that cannot be pickled.
        """
        self._workers.check()
        first = request.seqs[0]
        number = str(first.seq_id)
        message = packed(replace(request, request_id=number, queue=None))
        engine = self.placement.choose(request.prompt_token_ids, first.hash_seed)
        placed = Placed(request, engine, sum(seq.end for seq in request.seqs))
        self.placement.work[engine] += placed.work
        self.placed[number] = placed
        self.unsent[engine][number] = message
        self.output_processor.requests[request.request_id] = request

    def sort_waiting_longest_first(self) -> None:
        self.longest_first = True

    def _take(self, number: str) -> Placed | None:
        """Takes a request out of all records. None if it is not there."""
        placed = self.placed.pop(number, None)
        if placed is not None:
            self.placement.work[placed.engine] -= placed.work
            del self.output_processor.requests[placed.request.request_id]
        return placed

    def _abort(self, request_ids: list[str]) -> None:
        ended: list[list[str]] = [[] for _ in self.unsent]
        for request_id in request_ids:
            request = self.output_processor.requests.get(request_id)
            if request is not None:
                number = str(request.seqs[0].seq_id)
                placed = self._take(number)
                assert placed is not None
                if self.unsent[placed.engine].pop(number, None) is None:
                    ended[placed.engine].append(number)
        for engine, numbers in enumerate(ended):
            if numbers and self._workers.failure is None:
                self._send(engine, packed(End(numbers)))

    def end_request(self, request_id: str) -> RequestOutput | None:
        with self.exclusive():
            request = self.output_processor.requests.get(request_id)
            if request is None:
                return None
            self._send_unsent()
            number = str(request.seqs[0].seq_id)
            engine = self.placed[number].engine
            (output,) = self._call(LLMEngine.end_request, number, engines=[engine])
            if self._take(number) is None or output is None:  # it finished in the meantime
                return None
            output.request_id = request_id
            return output

    def reset(self) -> None:
        """Drops all requests and all cached prefixes."""
        for number in list(self.placed):
            self._take(number)
        for unsent in self.unsent:
            unsent.clear()
        self.longest_first = False
        self.placement.clear()
        self.era += 1
        if self._workers.failure is None:
            for engine in range(self.size):
                self._send(engine, packed(Reset(self.era)))

    def run_step(self) -> None:
        """Sends new requests, and waits a moment for outputs of any engine."""
        with self.exclusive():
            self._workers.check()
            self._abort(self.to_abort)
            self.to_abort.clear()
            self.stepping = True
            try:
                self._send_unsent()
                self._receive()
            except BaseException:
                self.reset()
                raise
            finally:
                self.stepping = False

    # -- messages ----------------------------------------------------------------------------------

    @property
    def _workers(self) -> Workers:
        assert self.workers is not None
        return self.workers

    def _send(self, engine: int, message: bytes) -> None:
        was_stepping = self.stepping
        self.stepping = True  # so that a garbage collection sends nothing in between
        try:
            with uninterrupted():  # because a part of a message would make the rest unreadable
                self._workers.connections[engine].send_bytes(message)
        except OSError as error:  # the process has ended
            self._workers.failed.wait(5 * GRACE)
            self._workers.check()
            raise EngineDeadError(f"engine {engine + 1} closed its connection") from error
        finally:
            self.stepping = was_stepping

    def _send_unsent(self) -> None:
        for engine, unsent in enumerate(self.unsent):
            if unsent:
                message = packed(Add(unsent, self.longest_first))
                unsent.clear()
                self._send(engine, message)
        self.longest_first = False

    def _receive(self) -> None:
        """Handles all messages that are there. Waits a moment for the first.

        Raises EngineDeadError if an engine's process has ended, or the exception of an
        engine's step.
        """
        timeout = POLL
        while True:
            try:
                reply = self._workers.inbox.get(timeout=timeout)
            except queue.Empty:
                return
            timeout = 0
            if reply is None:
                self._workers.inbox.put(None)  # for the next call
                raise EngineDeadError(self._workers.failure)
            message = pickle.loads(reply[1])
            if isinstance(message, Failed):
                if message.era == self.era:  # else it is of requests that were dropped before
                    self.reset()
                    raise message.error
            elif isinstance(message, Answer):
                if message.number == self.call_number:
                    self.answers.append(message)
            elif isinstance(message, Refused):
                self._refuse(message)
            else:
                self._pass_on(message)

    def _pass_on(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            number = output.request_id
            placed = self.placed.get(number)
            if placed is None:  # it was aborted
                continue
            output.request_id = placed.request.request_id
            output.lora_request = placed.request.lora_request
            if output.finished:
                self._take(number)
            self._deliver(placed.request, output)

    def _deliver(self, request: Request, output: RequestOutput) -> None:
        if request.queue is None:
            self.undelivered.append(output)
        else:
            request.queue.append(output)

    def _refuse(self, refused: Refused) -> None:
        """Ends a request with an error. Others go on."""
        placed = self._take(refused.number)
        if placed is None:  # it was aborted
            return
        request = placed.request
        completions = [
            CompletionOutput(i, "", [], None, None, "error", refused.sentence)
            for i in range(len(request.seqs))
        ]
        self._deliver(request, request_output(request, completions, finished=True))

    def _wait_for_answers(self, count: int) -> list[Answer]:
        """The answers to the last call, by engine. Raises the first engine's error."""
        while len(self.answers) < count:
            with uninterrupted():  # because an interrupt could lose an output of a request
                self._receive()
        answers = sorted(self.answers, key=lambda answer: answer.engine)
        self.answers = []
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return answers

    def _call(
        self, function: Callable[..., Result], *args: object, engines: Sequence[int] | None = None
    ) -> list[Result]:
        """`function(engine, *args)` in the processes of these engines. None: of all."""
        with self.exclusive():
            self._workers.check()
            self.call_number = next(self.call_numbers)
            self.answers = []
            work = packed((function, args), "a function or its arguments")
            message = packed(Call(self.call_number, work))
            chosen = range(self.size) if engines is None else engines
            self.stepping = True
            try:
                for engine in chosen:
                    self._send(engine, message)
                answers = self._wait_for_answers(len(chosen))
            finally:
                self.stepping = False
        return [cast(Result, answer.value) for answer in answers]

    # -- all engines -------------------------------------------------------------------------------

    def collective_rpc(
        self,
        method: str | Callable[..., object],
        timeout: float | None = None,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> list[object]:
        """One result for each rank of the first engine, then of the second, and so on."""
        with self.exclusive():
            results = self._call(LLMEngine.collective_rpc, method, timeout, args, kwargs)
            self.freed_tags = set().union(*self._call(freed))
        return [result for of_engine in results for result in of_engine]

    def list_loras(self) -> set[int]:
        """The lora_int_id of every adapter in the memory of some engine."""
        self._need_adapters("list_loras")
        return set().union(*self._call(LLMEngine.list_loras))

    def _adapters_in_use(self) -> set[Adapter | None]:
        return {placed.request.seqs[0].adapter for placed in self.placed.values()}

    def running_adapters(self) -> set[Adapter | None]:
        return set()  # each engine knows its own

    def set_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        super().set_tokenizer(tokenizer)
        if self.workers is not None:
            self._call(LLMEngine.set_tokenizer, tokenizer)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        with self.exclusive():
            self._check_reset(reset_running_requests)
            self.placement.clear()
            return all(self._call(LLMEngine.reset_prefix_cache))

    def get_metrics(self) -> list[Metric]:
        """Sums over the engines. The use of the KV cache is the mean."""
        totals: dict[str, float] = {}
        for metrics in self._call(LLMEngine.get_metrics):
            for metric in metrics:
                share = metric.value
                if metric.name.endswith("_perc"):
                    share /= self.size
                totals[metric.name] = totals.get(metric.name, 0) + share
        return [Metric(name, value) for name, value in totals.items()]

    @property
    def freed(self) -> set[str]:
        return self.freed_tags

    def close(self) -> None:
        self.close_once()

    def __getattr__(self, name: str) -> NoReturn:
        """Only for attributes that are not here, such as model_executor and scheduler."""
        raise AttributeError(
            f"llm_engine.{name}: with data_parallel_size={self.args.data_parallel_size} the "
            "models are in other processes; use LLM.apply_model or LLM.collective_rpc"
        )


def packed(message: object, what: str = "a request") -> bytes:
    """The pickled message. Raises TypeError if a part of it cannot be pickled."""
    try:
        return pickle.dumps(message)
    except Exception as error:
        raise TypeError(
            f"data_parallel_size: {what} cannot be sent to the engines ({error}); use functions "
            "that are defined at the top level of a file"
        ) from error


# -- an engine's process ---------------------------------------------------------------------------


def freed(engine: LLMEngine) -> set[str]:
    return engine.freed


def run_engine(number: int, connection_fd: int) -> None:
    """The main function of an engine's process. number: from 1."""
    global ENGINE
    ENGINE = number
    threading.Thread(target=end_with, args=(connection_fd,), daemon=True).start()
    connection = Connection(connection_fd)
    try:
        serve(connection, number - 1)
    except BaseException:
        report = (time.monotonic(), f"engine {number} raised\n{traceback.format_exc()}")
        connection.send_bytes(REPORT + pickle.dumps(report))
        sys.exit(1)


def serve(connection: Connection, number: int) -> None:
    """Runs requests and calls until STOP."""
    start: Start = pickle.loads(connection.recv_bytes())
    ranks.SCRIPT = start.script
    try:
        engine = LLMEngine(start.args)
    except Exception as error:
        reply(connection, Answer(0, number, None, sendable(error)))
        connection.recv_bytes()  # STOP
        return
    reply(connection, Answer(0, number, None))
    Server(engine, connection, start.script, number).run()


def reply(connection: Connection, message: object) -> None:
    connection.send_bytes(REPLY + pickle.dumps(message))


class Server:
    """One engine at the other end of a connection."""

    def __init__(
        self, engine: LLMEngine, connection: Connection, script: dict[str, object], number: int
    ) -> None:
        self.engine = engine
        self.connection = connection
        self.script = script
        self.number = number
        self.era = 0  # of the last `Reset`

    def run(self) -> None:
        """Handles messages between steps, until STOP."""
        while True:
            while self.connection.poll() or not self.engine.has_unfinished_requests():
                message = self.connection.recv_bytes()
                if message == STOP:
                    self.engine.close()
                    return
                self.handle(pickle.loads(message))
            try:
                outputs = self.engine.step()
            except EngineDeadError:
                raise
            except Exception as error:
                reply(self.connection, Failed(sendable(error), self.era))
            else:
                if outputs:
                    reply(self.connection, outputs)

    def handle(self, message: object) -> None:
        if isinstance(message, Add):
            is_alone = not self.engine.has_unfinished_requests()
            for number, request in message.requests.items():
                self.add(number, request)
            if is_alone and message.longest_first:
                self.engine.sort_waiting_longest_first()
        elif isinstance(message, End):
            self.engine.abort_request(message.numbers)
        elif isinstance(message, Reset):
            self.era = message.era
            self.engine.reset()
        elif isinstance(message, Call):
            self.answer(message)

    def add(self, number: str, message: bytes) -> None:
        """Queues a pickled request, with this engine's own objects in it."""
        try:
            request = unpickle(message, self.script)
            assert isinstance(request, Request)
            for seq in request.seqs:
                self.use_own(seq)
            self.engine.enqueue(request)
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}"
            reply(self.connection, Refused(number, sentence))

    def use_own(self, seq: core.Sequence) -> None:
        """Replaces the copies of what the engine has once: adapters, objects of user classes."""
        if seq.adapter is not None:
            assert self.engine.adapters is not None
            seq.adapter = self.engine.adapters.adopt(seq.adapter)
        if ENGINE_PROCESSORS.name in seq.prepared:
            own = self.engine.input_processor.facts.logits_processors
            seq.prepared = {**seq.prepared, ENGINE_PROCESSORS.name: own}

    def answer(self, call: Call) -> None:
        try:
            work = unpickle(call.work, self.script)
            function, args = cast(tuple[Callable[..., object], tuple[object, ...]], work)
            answer = Answer(call.number, self.number, function(self.engine, *args))
            reply(self.connection, answer)
        except Exception as error:
            reply(self.connection, Answer(call.number, self.number, None, sendable(error)))


def sendable(error: Exception) -> Exception:
    """The exception, or one with its text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
