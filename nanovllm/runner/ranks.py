"""Ranks as processes: rank 0 is the user's process, the others are new interpreters.

A step's packed batch lies in shared memory, and an empty message wakes the ranks. Any
other call is one pickled message. If a rank dies or raises, all ranks end, and every
later call raises `EngineDeadError` with that rank's traceback.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.spawn import get_preparation_data, prepare
from types import FrameType
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from nanovllm.core.batch import Batch, ceil_div, pack, unpack
from nanovllm.core.step import StepResult
from nanovllm.parallel import TensorParallel
from nanovllm.runner.executor import EngineDeadError, Executor, Method, call
from nanovllm.runner.model_runner import ModelRunner, PendingStep
from nanovllm.runner.setup import Setup
from nanovllm.runner.start import make_runner

START = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "import sys; sys.path[:] = {path!r}; "
    "from nanovllm.runner.ranks import run_rank; "
    "run_rank({rank}, {connection}, {slots}, {progress})"
)
RENDEZVOUS_TIMEOUT = timedelta(seconds=60)  # for started ranks to find each other
GRACE = 1.0  # seconds for the other ranks' reports after one rank's failure
RANK = 0  # this process's rank; `run_rank` sets it
# The user's script, where this process runs an engine of data parallelism.
SCRIPT: dict[str, object] | None = None

# A message to rank 0 begins with one of these bytes.
REPLY = b"r"
REPORT = b"f"
STOP = b"stop"  # to a rank, instead of a pickled call

Result = TypeVar("Result")


@dataclass
class Start:
    """The first message to a rank."""

    setup: Setup
    port: int  # of the TCPStore at which the ranks meet
    size: int
    script: dict[str, object]  # the user's script, as multiprocessing describes it


@dataclass
class Call:
    """A message: call `method(worker, ...)`, or the worker's method of that name."""

    method: Method
    args: tuple[object, ...]
    kwargs: dict[str, object]


# -- rank 0: the executor --------------------------------------------------------------------------


class SpawnedExecutor(Executor):
    """Rank 0 of several. Invariant: every rank gets the same steps in the same order."""

    def __init__(self, setup: Setup, size: int) -> None:
        if RANK:
            raise RuntimeError(
                f"rank {RANK} ran the user's script to find a function, and the script makes an "
                "engine: put the engine under `if __name__ == '__main__':`, or the function into "
                "a file of its own"
            )
        # A rank's share of the cores, for rank 0 too, because ranks wait for each other.
        self.threads = max(1, torch.get_num_threads() // size) if setup.device.type == "cpu" else 0
        self.tp = TensorParallel()  # `_start` joins the others
        self.slots = [Slot(os.memfd_create("nanovllm")) for _ in range(2)]
        self.progress = Progress(os.memfd_create("nanovllm"), size)
        self.step_timeout = setup.args.step_timeout
        self.pending: list[PendingStep | None] = [None, None]  # the last step of each slot
        self.slot_numbers = itertools.cycle((0, 1))
        slot_fds = [slot.fd for slot in self.slots]
        self.workers = Workers(size, slot_fds, self.progress.fd, self.threads)
        self.close_once = weakref.finalize(self, close, self.workers, [*slot_fds, self.progress.fd])
        try:
            with self._few_threads():
                super().__init__(self._start(setup, size))
            self.workers.replies()
        except BaseException as err:
            self._fail(err)
            raise

    def _start(self, setup: Setup, size: int) -> ModelRunner:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1",
            port,
            None,
            True,
            RENDEZVOUS_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self.workers.send(pickle.dumps(Start(setup, port, size, user_script())))
        self.workers.replies()
        tp = self.workers.unless_dead(lambda: TensorParallel.join(store, 0, size, setup.device))
        self.tp = tp
        self.workers.on_failure = tp.abort
        tp.progress = self.progress.counts
        return make_runner(setup, tp)

    def launch(self, batch: Batch[np.ndarray]) -> PendingOnAllRanks:
        self._check()
        with uninterrupted(), self._few_threads():
            try:
                self.runner.tp.count()
                number = next(self.slot_numbers)
                # After its step all ranks have read a slot, because ranks step together.
                previous = self.pending[number]
                if previous is not None:
                    with self._limited():
                        previous.collect()
                self.slots[number].write(batch)
                self.workers.send(b"")
                with self._limited():
                    pending = self.runner.launch(batch)
                self.pending[number] = pending
            except BaseException as err:
                self._fail(err)
                raise
        return PendingOnAllRanks(pending, self)

    def collect(self, pending: PendingStep) -> StepResult:
        try:
            with self._limited():
                result = pending.collect()
        except Exception as err:
            self._fail(err)
            raise
        # If a rank died, the result is wrong, because NCCL's collectives were aborted.
        self._check()
        return result

    def collective_rpc(
        self, method: Method, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> list[object]:
        self._check()
        try:
            message = pickle.dumps(Call(method, args, kwargs or {}))
        except Exception as err:
            raise TypeError(
                f"collective_rpc: {method!r} or its arguments cannot be sent to other ranks "
                f"({err}); use functions that are defined at the top level of a file"
            ) from err
        failure: Exception | None = None
        results: list[object] = []
        try:
            self.workers.send(message)
            with self._few_threads():
                try:
                    results.append(call(self.runner, method, args, kwargs or {}))
                except Exception as err:
                    failure = err
            replies = self.workers.replies(timeout=None if failure is None else 30)
        except BaseException as err:
            self._fail(err)
            raise
        if failure is not None:
            raise failure
        for rank, reply in enumerate(replies, 1):
            succeeded, value = pickle.loads(reply)
            if not succeeded:
                raise RuntimeError(f"collective_rpc: rank {rank} raised\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        self._free_graphs()
        self.close_once()
        self.tp.close()

    def _free_graphs(self) -> None:
        """Frees this rank's recordings, because `on_failure` in another thread waits for them."""
        if hasattr(self, "runner"):
            self.runner.drop_recordings()

    def _check(self) -> None:
        """Raises EngineDeadError if a rank has failed or the engine is closed."""
        try:
            self.workers.check()
        except EngineDeadError:
            self.close()
            raise

    @contextmanager
    def _few_threads(self) -> Iterator[None]:
        """Uses the rank's share of the threads. Restores the user's number at the end."""
        threads = torch.get_num_threads()
        if self.threads:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            if self.threads:
                torch.set_num_threads(threads)

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Ends all ranks if the body takes longer than step_timeout. Rank 0 then raises."""
        if self.step_timeout is None:
            yield
            return
        timer = threading.Timer(self.step_timeout, self._end_hanging)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_hanging(self) -> None:
        ranks = self.progress.behind()
        names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"
        self.workers.end_all(
            f"{names} did not finish a step within step_timeout={self.step_timeout} s"
        )

    def _fail(self, err: BaseException) -> None:
        """Ends all ranks after an error, because their steps may now differ.

        Raises EngineDeadError if another rank failed first.
        """
        # A collective or a socket raises these if another rank is dead.
        if isinstance(err, (RuntimeError, OSError)):
            self.workers.failed.wait(5 * GRACE)
        other_failed = self.workers.failed.is_set()
        self.workers.failure = self.workers.failure or f"rank 0 raised {type(err).__name__}: {err}"
        self.close()
        if other_failed and not isinstance(err, EngineDeadError):
            raise EngineDeadError(self.workers.failure) from err


@dataclass
class PendingOnAllRanks:
    """A step that was launched on all ranks."""

    pending: PendingStep
    executor: SpawnedExecutor

    def collect(self) -> StepResult:
        return self.executor.collect(self.pending)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C until the end, because all ranks must launch the same steps.

    A second Ctrl-C is not delayed.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    delayed: list[tuple[int, FrameType | None]] = []

    def later(number: int, frame: FrameType | None) -> None:
        delayed.append((number, frame))
        if len(delayed) > 1:
            handler(number, frame)

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if delayed:
        handler(*delayed[0])


# -- rank 0 and the other ranks: shared memory -----------------------------------------------------


class Slot:
    """Shared memory for one packed batch. It grows as needed and ends with its processes.

    Layout in bytes: two int64 (the length of the pickled layout, the number of words),
    the pickled layout, padding to a multiple of 16, the words.
    """

    HEAD = 16

    def __init__(self, fd: int) -> None:
        self.fd = fd
        if not os.fstat(fd).st_size:
            os.ftruncate(fd, 1 << 20)
        self.memory = mmap.mmap(fd, 0)

    def write(self, batch: Batch[np.ndarray]) -> None:
        words, places = pack(batch)
        layout = pickle.dumps(places)
        start = self._words_start(len(layout))
        size = start + words.nbytes
        if size > len(self.memory):
            os.ftruncate(self.fd, 2 * size)
            self.memory = mmap.mmap(self.fd, 0)
        self.memory[: self.HEAD] = np.array([len(layout), len(words)], np.int64).tobytes()
        self.memory[self.HEAD : self.HEAD + len(layout)] = layout
        np.frombuffer(self.memory, np.int32, len(words), start)[:] = words

    def read(self) -> Batch[np.ndarray]:
        """The batch, as views of the memory. They are valid until the next write."""
        if os.fstat(self.fd).st_size > len(self.memory):
            self.memory = mmap.mmap(self.fd, 0)
        layout_bytes, num_words = np.frombuffer(self.memory, np.int64, 2).tolist()
        layout = pickle.loads(self.memory[self.HEAD : self.HEAD + layout_bytes])
        start = self._words_start(layout_bytes)
        words = np.frombuffer(self.memory, np.int32, num_words, start)
        return unpack(layout, words, np.float32)

    def _words_start(self, layout_bytes: int) -> int:
        return ceil_div(self.HEAD + layout_bytes, 16) * 16


class Progress:
    """Shared memory that says how far each rank is.

    Invariant: `counts[rank]` [size] int64 is how many steps and collectives rank has begun.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        os.ftruncate(fd, 8 * size)
        self.counts = np.frombuffer(mmap.mmap(fd, 8 * size), np.int64)

    def behind(self) -> list[int]:
        """The ranks that have begun least. All ranks, where they wait for their devices."""
        counts = self.counts.copy()
        return np.flatnonzero(counts == counts.min()).tolist()


# -- rank 0: the processes of the other ranks ------------------------------------------------------


class Workers:
    """The processes of ranks 1 and up.

    Invariant: they end when `close` is called, when one of them fails, and when this
    process ends. `failure` is the sentence for `EngineDeadError`.
    start: the program of a process. noun: how sentences name a process.
    """

    def __init__(
        self,
        size: int,
        slots: list[int],
        progress: int,
        threads: int,
        start: str = START,
        noun: str = "rank",
    ) -> None:
        self.start = start
        self.noun = noun
        self.pid = os.getpid()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self.inbox: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self.failure: str | None = None
        self.failed = threading.Event()
        self.closing = False
        self.on_failure: Callable[[], None] = lambda: None
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
        for rank in range(1, size):
            self._start(rank, slots, progress, env)
        self.listener = threading.Thread(target=self._listen, name=f"nanovllm {noun}s", daemon=True)
        self.listener.start()

    def _start(
        self, rank: int, slots: list[int], progress: int, env: dict[str, str] | None
    ) -> None:
        ours, theirs = socket.socketpair()
        connection = theirs.fileno()
        code = self.start.format(
            path=sys.path, rank=rank, connection=connection, slots=slots, progress=progress
        )
        # Not multiprocessing, because its processes run the user's script again, which
        # then needs a guard for __main__.
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            env=env,
            pass_fds=[fd for fd in (connection, *slots, progress) if fd >= 0],
        )
        theirs.close()
        self.processes.append(process)
        self.connections.append(Connection(ours.detach()))

    def check(self) -> None:
        if self.failure is not None:
            raise EngineDeadError(f"this engine is dead and a new one is needed: {self.failure}")

    def send(self, message: bytes) -> None:
        for connection in self.connections:
            connection.send_bytes(message)

    def replies(self, timeout: float | None = None) -> list[bytes]:
        """One reply of each rank, in order of rank.

        Raises EngineDeadError if a rank fails, and RuntimeError after `timeout` seconds.
        """
        found: dict[int, bytes] = {}
        while len(found) < len(self.processes):
            try:
                reply = self.inbox.get(timeout=timeout)
            except queue.Empty:
                missing = set(range(1, len(self.processes) + 1)) - set(found)
                raise RuntimeError(
                    f"ranks {sorted(missing)} have not answered for {timeout:.0f} s"
                ) from None
            if reply is None:
                raise EngineDeadError(self.failure)
            found[reply[0]] = reply[1]
        return [found[rank] for rank in sorted(found)]

    def unless_dead(self, function: Callable[[], Result]) -> Result:
        """The result of a function that waits for the other ranks.

        Raises EngineDeadError as soon as a rank fails.
        """
        results: queue.SimpleQueue[Result | Exception] = queue.SimpleQueue()

        def run() -> None:
            try:
                results.put(function())
            except Exception as err:
                results.put(err)

        threading.Thread(target=run, daemon=True).start()
        while not self.failed.is_set():
            try:
                result = results.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(result, Exception):
                raise result
            return result
        raise EngineDeadError(self.failure)

    def _listen(self) -> None:
        """Receives all messages. Replies go to the inbox; a failure ends all ranks."""
        ranks: dict[Connection, int] = dict(zip(self.connections, itertools.count(1)))
        reported: set[int] = set()
        reports: list[tuple[float, str]] = []  # (time, text)
        while ranks:
            ready = wait(list(ranks), timeout=GRACE if reports else None)
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = ranks[connection]
                try:
                    message = connection.recv_bytes()
                except (EOFError, OSError):
                    del ranks[connection]
                    if rank not in reported:
                        reports.append((0.0, self._describe_exit(rank)))
                    continue
                if message[:1] == REPLY:
                    self.inbox.put((rank, message[1:]))
                else:
                    reports.append(pickle.loads(message[1:]))
                    reported.add(rank)
        if not self.closing:
            # The first report is the cause. Other ranks then report lost connections.
            self.end_all(min(reports)[1])

    def end_all(self, failure: str) -> None:
        """Kills the ranks. The first failure stays the one that errors name."""
        if self.failed.is_set():
            return
        self.failure = self.failure or failure
        self.failed.set()
        self.inbox.put(None)
        for process in self.processes:
            process.kill()
        self.on_failure()
        for process in self.processes:
            process.wait()

    def _describe_exit(self, rank: int) -> str:
        process = self.processes[rank - 1]
        name = f"{self.noun} {rank} (process {process.pid})"
        try:
            code = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return f"{name} closed its connection"
        if code >= 0:
            return f"{name} exited with status {code}, see its output"
        hint = ", as Linux does when memory runs out" if code == -signal.SIGKILL else ""
        return f"{name} was killed by {signal.Signals(-code).name}{hint}"

    def close(self) -> None:
        if self.pid != os.getpid():  # a forked process must not end the ranks
            return
        self.closing = True
        self.failure = self.failure or "it was closed"
        for connection in self.connections:
            with suppress(OSError):
                connection.send_bytes(STOP)
        deadline = time.monotonic() + GRACE
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.listener.join(GRACE)
        self.on_failure = lambda: None


def close(workers: Workers, fds: list[int]) -> None:
    workers.close()
    while fds:
        os.close(fds.pop())


# -- the other ranks -------------------------------------------------------------------------------


def run_rank(rank: int, connection_fd: int, slot_fds: list[int], progress_fd: int) -> None:
    """The main function of the process of rank 1 or up."""
    global RANK
    RANK = rank
    threading.Thread(target=end_with, args=(connection_fd,), daemon=True).start()
    connection = Connection(connection_fd)
    try:
        serve(rank, connection, [Slot(fd) for fd in slot_fds], progress_fd)
    except BaseException:
        report = (time.monotonic(), f"rank {rank} raised\n{traceback.format_exc()}")
        connection.send_bytes(REPORT + pickle.dumps(report))
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def end_with(connection_fd: int) -> None:
    """Ends this process when rank 0 closes the connection or dies."""
    hangup = select.poll()
    hangup.register(connection_fd, 0)
    hangup.poll()
    os._exit(1)


def serve(rank: int, connection: Connection, slots: list[Slot], progress_fd: int) -> None:
    """Runs steps and calls until rank 0 sends STOP."""
    start: Start = pickle.loads(connection.recv_bytes())
    setup = start.setup
    connection.send_bytes(REPLY)
    if setup.device.type == "cuda":
        setup.device = torch.device("cuda", (setup.device.index or 0) + rank)
        torch.cuda.set_device(setup.device)
    store = dist.TCPStore("127.0.0.1", start.port, None, False, RENDEZVOUS_TIMEOUT)
    tp = TensorParallel.join(store, rank, start.size, setup.device)
    tp.progress = Progress(progress_fd, start.size).counts
    runner = make_runner(setup, tp)
    connection.send_bytes(REPLY)
    for slot in itertools.cycle(slots):
        message = connection.recv_bytes()
        while message:
            if message == STOP:
                runner.close()
                return
            connection.send_bytes(REPLY + answer(runner, message, start.script))
            message = connection.recv_bytes()
        tp.count()
        runner.launch(slot.read())


def answer(runner: ModelRunner, message: bytes, script: dict[str, object]) -> bytes:
    """Runs a pickled call. Returns the pickled (True, result) or (False, traceback)."""
    try:
        request = unpickle(message, script)
        assert isinstance(request, Call)
        result = call(runner, request.method, request.args, request.kwargs)
        return pickle.dumps((True, result))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))


def user_script() -> dict[str, object]:
    """The user's script, in the form that `prepare` of multiprocessing reads."""
    if SCRIPT is not None:
        return SCRIPT
    data = get_preparation_data("rank")
    return {
        key: value
        for key, value in data.items()
        if key == "sys_argv" or key.startswith("init_main")
    }


def unpickle(message: bytes, script: dict[str, object]) -> object:
    """The pickled object. Its functions may be in the user's script."""
    try:
        return pickle.loads(message)
    except (AttributeError, ModuleNotFoundError):
        # Only then does the script run here, under another name than __main__.
        prepare(script)
        return pickle.loads(message)
