"""Where the records go: a page, a file of JSON lines, or Chrome's trace events."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TextIO

from nanovllm.trace.chrome import write_chrome_trace
from nanovllm.trace.page import write_page


class TraceFile(ABC):
    """Takes records as lines of JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def write(self, line: str) -> None:
        """Adds a record."""

    @abstractmethod
    def finish(self) -> None:
        """Makes the file complete up to the last record."""

    @abstractmethod
    def close(self) -> None:
        """No record follows."""


class LinesFile(TraceFile):
    """One record a line. A process that is killed leaves all whole lines."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.file: TextIO | None = None  # opened by the first record

    def write(self, line: str) -> None:
        if self.file is None:
            self.file = self.path.open("w", encoding="utf-8")
        self.file.write(line + "\n")
        self.file.flush()

    def finish(self) -> None:
        pass

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class WholeFile(TraceFile):
    """A file that is replaced as a whole. Keeps the records as text, which is small."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line)

    def finish(self) -> None:
        records = [json.loads(line) for line in self.lines]
        draft = self.path.with_name(self.path.name + ".new")
        if self.path.suffix == ".html":
            write_page(records, draft)
        else:
            write_chrome_trace(records, draft)
        os.replace(draft, self.path)

    def close(self) -> None:
        pass


def open_trace(path: Path) -> TraceFile:
    """The file for the ending of `path`, which stays as it is until something is recorded.

    Raises OSError where it cannot be written.
    """
    check_writable(path)
    path = path.absolute()  # the program may change its folder
    return LinesFile(path) if path.suffix == ".jsonl" else WholeFile(path)


def check_writable(path: Path) -> None:
    """Raises OSError before the model is loaded, not after the run."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"trace={str(path)!r}: there is no folder {str(path.parent)!r}")
    is_new = not path.exists()
    path.open("a").close()
    if is_new:
        path.unlink()
