"""The output: lines that are appended and flushed, and what a former run has left of them."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from nanovllm.batch.work import JsonObject
from nanovllm.errors import ValidationError

Numbering = Callable[[JsonObject], int | None]


class OutputFile:
    """Invariant: the file holds whole lines, one for each number in `done`.

    A process that dies while it writes leaves half a line. The next run removes it.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError while another process writes to the file."""
        self.path = path
        self.done = Numbers()
        self.file: BinaryIO = path.open("ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise ValidationError(f"{path}: another process writes to this file") from None

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def is_empty(self) -> bool:
        return os.fstat(self.file.fileno()).st_size == 0

    def clear(self) -> None:
        self.file.truncate(0)

    def resume(self, number_of: Numbering) -> None:
        """Reads what former runs have written, and removes half a line at the end.

        Raises ValueError for a line that is none of this command's.
        """
        whole = 0  # bytes of whole lines
        with self.path.open("rb") as file:
            for index, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                self.done.add(self._number(index, line, number_of))
                whole += len(line)
        self.file.truncate(whole)

    def _number(self, index: int, line: bytes, number_of: Numbering) -> int:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        number = number_of(record) if isinstance(record, dict) else None
        if number is None:
            raise ValidationError(
                f"{self.path}: line {index} is none of this command's; move the file away, or "
                "replace it with --overwrite"
            )
        return number

    def write(self, record: JsonObject, number: int) -> None:
        """Appends a line. The line survives SIGKILL after `flush`."""
        self.file.write(json_line(record))
        self.done.add(number)

    def flush(self) -> None:
        self.file.flush()


class Numbers:
    """A set of numbers from 1, of which each takes one bit."""

    def __init__(self) -> None:
        self.bits = bytearray()
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __contains__(self, number: int) -> bool:
        byte = number >> 3
        return byte < len(self.bits) and bool(self.bits[byte] >> (number & 7) & 1)

    def add(self, number: int) -> None:
        if number in self:
            return
        byte = number >> 3
        if byte >= len(self.bits):
            self.bits.extend(bytes(byte + 1 - len(self.bits)))
        self.bits[byte] |= 1 << (number & 7)
        self.count += 1


def json_line(record: JsonObject) -> bytes:
    """One line of JSON. Dates, decimals and bytes become text, NaN and infinities null."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        text = json.dumps(finite(record), ensure_ascii=False, default=str)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which only \u escapes can write
        return json.dumps(finite(record), default=str).encode() + b"\n"


def finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return value
