"""Stand-ins that note when a rank's graphs are freed and when its group ends.

The group waits until its graphs are freed, as NCCL's does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

WAIT = 5  # seconds; a group that waits so long would wait forever
IN_ORDER = ["graphs freed", "group ended"]

Note = Callable[[str], object]


class Graphs:
    def __init__(self, note: Note) -> None:
        self.note = note
        self.freed = threading.Event()

    def has_graph(self, batch: Any) -> bool:
        return False

    def clear(self) -> None:
        self.note("graphs freed")
        self.freed.set()


class Nccl:
    """A gloo group that says it is NCCL's."""

    def __init__(self, gloo: Any, graphs: Graphs) -> None:
        self.gloo = gloo
        self.graphs = graphs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gloo, name)

    def name(self) -> str:
        return "nccl"

    def abort(self) -> None:
        was_freed = self.graphs.freed.wait(WAIT)
        self.graphs.note("group ended" if was_freed else "group waits for graphs")


def note_ends(runner: Any, note: Note) -> None:
    """From now on, `note` gets the ends of the runner's graphs and group."""
    graphs = Graphs(note)
    runner.graphs = graphs
    runner.tp.group = Nccl(runner.tp.group, graphs)
