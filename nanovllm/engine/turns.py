"""One thread at a time in an engine, in the order in which threads asked for it. Knows nothing of engines."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A reentrant lock that is fair: a thread that steps in a loop cannot keep others waiting for more than one step.

    Invariant: `_owner` is a thread's id, or None while nobody waits. The lock passes directly to the first in `_waiting`.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        self._owner: int | None = None
        self._depth = 0

    @property
    def mine(self) -> bool:
        """Whether the calling thread holds the lock."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        if not self.mine:
            self._wait()
        self._depth += 1

    def _wait(self) -> None:
        me, gate = threading.get_ident(), threading.Lock()
        with self._mutex:
            if self._owner is None:
                self._owner = me
                return
            gate.acquire()
            self._waiting.append((me, gate))
        try:
            gate.acquire()
        except BaseException:  # Ctrl-C
            with self._mutex:
                if self._owner == me:
                    self._pass_on()
                else:
                    self._waiting.remove((me, gate))
            raise

    def _pass_on(self) -> None:
        self._owner = None
        if self._waiting:
            self._owner, gate = self._waiting.popleft()
            gate.release()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            with self._mutex:
                self._pass_on()
