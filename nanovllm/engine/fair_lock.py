"""A fair lock: threads get it in the order in which they asked. Knows no engine."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field


@dataclass(eq=False)
class Waiter:
    """A thread that waits. Releasing the gate wakes the thread."""

    thread: int
    gate: threading.Lock = field(default_factory=threading.Lock)


class FairLock:
    """A reentrant lock. A thread that steps in a loop delays others by one step at most.

    Invariant: `_owner` is the id of the thread that has the lock, or None if no thread
    has it. A release passes the lock directly to the first waiter.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiters: deque[Waiter] = deque()
        self._owner: int | None = None
        self._depth = 0

    @property
    def mine(self) -> bool:
        """Whether the calling thread has the lock."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        if not self.mine:
            self._acquire()
        self._depth += 1

    def _acquire(self) -> None:
        waiter = Waiter(threading.get_ident())
        with self._mutex:
            if self._owner is None:
                self._owner = waiter.thread
                return
            waiter.gate.acquire()
            self._waiters.append(waiter)
        try:
            waiter.gate.acquire()
        except BaseException:  # Ctrl-C
            with self._mutex:
                if self.mine:
                    self._release()
                else:
                    self._waiters.remove(waiter)
            raise

    def _release(self) -> None:
        self._owner = None
        if self._waiters:
            waiter = self._waiters.popleft()
            self._owner = waiter.thread
            waiter.gate.release()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            with self._mutex:
                self._release()
