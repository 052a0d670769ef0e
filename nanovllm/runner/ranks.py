"""Ranks that are processes of our own: rank 0 stays in the user's process, the others are fresh interpreters.

A step's packed batch lies in anonymous shared memory and an empty message wakes the ranks; any other call is one pickled
message. A rank that dies or raises ends them all, and every later call raises `EngineDeadError` with that rank's own
traceback. Top to bottom: the executor, what carries a batch, the processes as rank 0 sees them, the life of one of them.
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
from dataclasses import dataclass, fields
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.spawn import get_preparation_data, prepare
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanovllm.engine.batch import Batch
from nanovllm.parallel import TensorParallel
from nanovllm.runner.executor import EngineDeadError, Executor, call
from nanovllm.runner.model_runner import Launch, ModelRunner, StepResult
from nanovllm.runner.setup import Setup

START = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import sys; sys.path[:] = {path!r}; "
START += "from nanovllm.runner.ranks import run_rank; run_rank({rank}, {connection}, {slots})"
MEETING = timedelta(seconds=60)  # for ranks that are all up to find each other
GRACE = 1.0  # seconds between one rank's failure and the end of the others, for their reports
RANK = 0  # of a process that was started for it


class SpawnedExecutor(Executor):
    """Rank 0 of several, and the only one that schedules. Invariant: every rank has been told of the same steps."""

    def __init__(self, setup: Setup, size: int) -> None:
        if RANK:
            raise RuntimeError(
                f"rank {RANK} ran the user's script to find a function in it, and that makes an engine: put what makes it "
                "under `if __name__ == '__main__':`, or the function into a file of its own"
            )
        # A rank's share of the cores. Ranks wait for each other, so rank 0 gains nothing by taking more.
        self.threads = max(1, torch.get_num_threads() // size) if setup.device.type == "cpu" else 0
        self.slots = [Slot(os.memfd_create("nanovllm")) for _ in range(2)]
        self.launches: list[Launch | None] = [None, None]
        self.turns = itertools.cycle((0, 1))
        self.workers = Workers(size, [slot.fd for slot in self.slots], self.threads)
        self.close_once = weakref.finalize(self, close, self.workers, self.slots)
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
            "127.0.0.1", port, None, True, MEETING, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self.workers.send(pickle.dumps((setup, port, size, main_script())))
        self.workers.replies()
        tp = self.workers.unless_dead(lambda: TensorParallel.join(store, 0, size, setup.device))
        if setup.device.type == "cuda":
            self.workers.on_failure = tp.group.abort
        return ModelRunner(setup, tp)

    def launch(self, batch: Batch) -> SpawnedLaunch:
        self.workers.check()
        with uninterrupted(), self._few_threads():
            try:
                turn = next(self.turns)
                # What a slot holds was read by all ranks once its step is done, as no rank does one without the others.
                if (previous := self.launches[turn]) is not None:
                    previous.collect()
                self.slots[turn].write(batch)
                self.workers.send(b"")
                launch = self.launches[turn] = self.runner.launch(batch)
            except BaseException as err:
                self._fail(err)
                raise
        return SpawnedLaunch(launch, self)

    def collect(self, launch: Launch) -> StepResult:
        try:
            result = launch.collect()
        except Exception as err:
            self._fail(err)
            raise
        self.workers.check()  # when a rank died, what the device was waiting for was broken off
        return result

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        self.workers.check()
        try:
            message = pickle.dumps((method, args, kwargs or {}))
        except Exception as err:
            raise TypeError(
                f"collective_rpc: {method!r} or its arguments cannot be sent to other ranks ({err}); "
                "use functions that are defined at the top level of a file"
            ) from err
        failure: Exception | None = None
        try:
            self.workers.send(message)
            with self._few_threads():
                try:
                    results = [call(self.runner, method, args, kwargs or {})]
                except Exception as err:
                    failure = err
            replies = self.workers.replies(patience=None if failure is None else 30)
        except BaseException as err:
            self._fail(err)
            raise
        if failure is not None:
            raise failure
        for rank, (succeeded, value) in enumerate(map(pickle.loads, replies), 1):
            if not succeeded:
                raise RuntimeError(f"collective_rpc: rank {rank} raised\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        self.close_once()
        super().close()

    @contextmanager
    def _few_threads(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        if self.threads:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            if self.threads:
                torch.set_num_threads(threads)

    def _fail(self, err: BaseException) -> None:
        """Ends the ranks, which `err` left out of step. If another rank is the cause, raises what that one said."""
        if isinstance(err, (RuntimeError, OSError)):  # as collectives and sockets raise when their other end is gone
            self.workers.failed.wait(5 * GRACE)
        own = not self.workers.failed.is_set()
        self.workers.failure = self.workers.failure or f"rank 0 raised {type(err).__name__}: {err}"
        self.close_once()
        if hasattr(self, "runner"):
            self.runner.tp.close()
        if not own and not isinstance(err, EngineDeadError):
            raise EngineDeadError(self.workers.failure) from err


@dataclass
class SpawnedLaunch:
    launch: Launch
    executor: SpawnedExecutor

    def collect(self) -> StepResult:
        return self.executor.collect(self.launch)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until rank 0 has done what the other ranks were told to do; a second one does not."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[Any] = []

    def later(*signal_and_frame: Any) -> None:
        caught.append(signal_and_frame)
        if len(caught) > 1:
            handler(*signal_and_frame)

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        handler(*caught[0])


class Slot:
    """Anonymous shared memory for one packed batch: it has no name, grows as needed, and goes with its last process.

    int32 words: the number of words in use, the length of each field of a Batch, then the fields.
    """

    HEAD = 1 + len(fields(Batch))

    def __init__(self, fd: int) -> None:
        self.fd = fd
        if not os.fstat(fd).st_size:
            os.ftruncate(fd, 1 << 20)
        self.words = self._map()

    def _map(self) -> np.ndarray:
        return np.frombuffer(mmap.mmap(self.fd, 0), np.int32)

    def write(self, batch: Batch) -> None:
        packed, lengths = batch.pack()
        size = self.HEAD + len(packed)
        if size > len(self.words):
            os.ftruncate(self.fd, 8 * size)
            self.words = self._map()
        self.words[0], self.words[1 : self.HEAD] = size, lengths
        self.words[self.HEAD : size] = packed

    def read(self) -> Batch:
        """The batch, as views that hold until the next write."""
        size = self.words[0]
        if size > len(self.words):
            self.words = self._map()
        return Batch.unpack(self.words[1 : self.HEAD].tolist(), self.words[self.HEAD : size], np.float32)


class Workers:
    """The processes of ranks 1 and up. They end when told to, when one of them fails, and when this process ends."""

    def __init__(self, size: int, slots: list[int], threads: int) -> None:
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
            ours, theirs = socket.socketpair()
            code = START.format(path=sys.path, rank=rank, connection=theirs.fileno(), slots=slots)
            # Not multiprocessing: its children run the user's script again, which then needs a __main__ guard.
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                env=env,
                pass_fds=[theirs.fileno(), *slots],
            )
            theirs.close()
            self.processes.append(process)
            self.connections.append(Connection(ours.detach()))
        self.listener = threading.Thread(target=self._listen, name="nanovllm ranks", daemon=True)
        self.listener.start()

    def check(self) -> None:
        if self.failure is not None:
            raise EngineDeadError(f"this engine is dead and a new one is needed: {self.failure}")

    def send(self, message: bytes) -> None:
        for connection in self.connections:
            connection.send_bytes(message)

    def replies(self, patience: float | None = None) -> list[bytes]:
        """What each rank has to say next, in order of rank. Raises EngineDeadError if one dies first."""
        found: dict[int, bytes] = {}
        while len(found) < len(self.processes):
            try:
                reply = self.inbox.get(timeout=patience)
            except queue.Empty:
                missing = set(range(1, len(self.processes) + 1)) - set(found)
                raise RuntimeError(f"ranks {sorted(missing)} have not answered for {patience:.0f} s") from None
            if reply is None:
                raise EngineDeadError(self.failure)
            found[reply[0]] = reply[1]
        return [found[rank] for rank in sorted(found)]

    def unless_dead(self, function: Callable[[], Any]) -> Any:
        """function(), whose waiting for the other ranks is given up when one of them is dead."""
        done: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def run() -> None:
            try:
                done.put((True, function()))
            except Exception as err:
                done.put((False, err))

        threading.Thread(target=run, daemon=True).start()
        while not self.failed.is_set():
            try:
                succeeded, value = done.get(timeout=0.05)
            except queue.Empty:
                continue
            if succeeded:
                return value
            raise value
        raise EngineDeadError(self.failure)

    def _listen(self) -> None:
        """Sorts what ranks send: replies to the inbox; a report of a failure, or silence, ends them all."""
        alive = dict(zip(self.connections, itertools.count(1)))
        reports: list[tuple[float, str]] = []
        while alive:
            ready = wait(list(alive), timeout=GRACE if reports else None)
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv_bytes()
                except (EOFError, OSError):
                    rank = alive.pop(connection)
                    if rank > 0:  # without a report
                        reports.append((0.0, self._obituary(rank)))
                    continue
                if message[:1] == REPLY:
                    self.inbox.put((alive[connection], message[1:]))
                else:
                    reports.append(pickle.loads(message[1:]))
                    alive[connection] = -1
        if self.closing:
            return
        # The first is the cause; a rank that only lost its connection to that one reports later.
        self.failure = self.failure or min(reports)[1]
        self.failed.set()
        self.inbox.put(None)
        for process in self.processes:
            process.kill()
        self.on_failure()
        for process in self.processes:
            process.wait()

    def _obituary(self, rank: int) -> str:
        process = self.processes[rank - 1]
        try:
            code = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return f"rank {rank} (process {process.pid}) closed its connection"
        how = (
            f"exited with status {code}, see its output" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        )
        hint = ", as Linux does when memory runs out" if code == -signal.SIGKILL else ""
        return f"rank {rank} (process {process.pid}) {how}{hint}"

    def close(self) -> None:
        if self.pid != os.getpid():  # a forked copy of the user's process ends, not the user's process
            return
        self.closing = True
        self.failure = self.failure or "it was closed"
        for connection in self.connections:
            with suppress(OSError):
                connection.send_bytes(STOP)
        patience = time.monotonic() + GRACE
        for process in self.processes:
            try:
                process.wait(max(0.0, patience - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.listener.join(GRACE)
        self.on_failure = lambda: None


def close(workers: Workers, slots: list[Slot]) -> None:
    workers.close()
    while slots:
        os.close(slots.pop().fd)


# -- the other ranks -----------------------------------------------------------------------------------------------------

STOP = b"stop"  # no pickle
REPLY, REPORT = b"r", b"f"  # how what a rank sends begins


def run_rank(rank: int, connection_fd: int, slot_fds: list[int]) -> None:
    """The whole life of the process of rank 1 or up."""
    global RANK
    RANK = rank
    threading.Thread(target=end_with, args=(connection_fd,), daemon=True).start()
    connection = Connection(connection_fd)
    try:
        serve(rank, connection, [Slot(fd) for fd in slot_fds])
    except BaseException:
        connection.send_bytes(
            REPORT + pickle.dumps((time.monotonic(), f"rank {rank} raised\n{traceback.format_exc()}"))
        )
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def end_with(connection_fd: int) -> None:
    """Ends this process when the other end of the connection is closed, by rank 0's death at the latest."""
    hangup = select.poll()
    hangup.register(connection_fd, 0)
    hangup.poll()
    os._exit(1)


def serve(rank: int, connection: Connection, slots: list[Slot]) -> None:
    setup, port, size, main = pickle.loads(connection.recv_bytes())
    connection.send_bytes(REPLY)
    if setup.device.type == "cuda":
        setup.device = torch.device("cuda", (setup.device.index or 0) + rank)
        torch.cuda.set_device(setup.device)
    store = dist.TCPStore("127.0.0.1", port, None, False, MEETING)
    runner = ModelRunner(setup, TensorParallel.join(store, rank, size, setup.device))
    connection.send_bytes(REPLY)
    for turn in itertools.cycle(slots):
        while message := connection.recv_bytes():
            if message == STOP:
                return
            try:
                answer = pickle.dumps((True, call(runner, *unpickle(message, main))))
            except Exception:
                answer = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(REPLY + answer)
        runner.launch(turn.read())


def main_script() -> dict[str, Any]:
    """How to run the user's script once more, as multiprocessing says it."""
    data = get_preparation_data("rank")
    return {key: value for key, value in data.items() if key == "sys_argv" or key.startswith("init_main")}


def unpickle(message: bytes, main: dict[str, Any]) -> Any:
    try:
        return pickle.loads(message)
    except AttributeError:  # a function of the user's script: only then is that run here, not as __main__
        prepare(main)
        return pickle.loads(message)
