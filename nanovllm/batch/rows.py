"""Input files -> rows, one at a time: JSON lines and Parquet. Knows no format of requests."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from nanovllm.errors import ValidationError

MAX_LINE = 16 << 20  # bytes; a longer line becomes an error and is never wholly in memory
PARQUET_ROWS = 64  # rows that are decoded together
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Row:
    """A row of the input: a record, or the sentence that says why there is none."""

    number: int  # from 1; of JSON lines the number of the line
    record: dict[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class Part:
    """Some consecutive rows of an input, which can be read alone."""

    index: int  # from 0
    offset: int  # of JSON lines, in bytes; of Parquet the number of the row group
    num_before: int  # lines before the first one
    num_lines: int
    num_rows: int  # lines with text


@dataclass
class InputFile:
    """What one pass over an input finds."""

    path: Path
    num_rows: int
    digest: str  # of all bytes
    parts: list[Part]


def is_parquet(path: Path) -> bool:
    return path.suffix in (".parquet", ".pq")


def scan(path: Path, lines_a_part: int = sys.maxsize) -> InputFile:
    """Reads the whole file once. Lines without text are no rows.

    lines_a_part: of JSON lines. A part of a Parquet file is one of its row groups.
    """
    digest = xxhash.xxh3_128()
    parts = []
    with path.open("rb") as file:
        if is_parquet(path):
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            parts = row_groups(path)
        else:
            while part := scan_part(file, digest, parts, lines_a_part):
                parts.append(part)
    return InputFile(path, sum(part.num_rows for part in parts), digest.hexdigest(), parts)


def scan_part(
    file: BinaryIO, digest: xxhash.xxh3_128, parts: list[Part], max_lines: int
) -> Part | None:
    """The next part of a file of JSON lines. None at its end."""
    offset = file.tell()
    num_lines = 0
    num_rows = 0
    is_inside = False  # a line
    has_text = False
    while num_lines < max_lines and (piece := file.readline(1 << 20)):
        digest.update(piece)
        has_text = has_text or bool(piece.strip())
        is_inside = not piece.endswith(b"\n")
        if not is_inside:
            num_lines += 1
            num_rows += has_text
            has_text = False
    if is_inside:  # the last line of the file has no end
        num_lines += 1
        num_rows += has_text
    if not num_lines:
        return None
    before = parts[-1].num_before + parts[-1].num_lines if parts else 0
    return Part(len(parts), offset, before, num_lines, num_rows)


def row_groups(path: Path) -> list[Part]:
    metadata = parquet_file(path).metadata
    parts = []
    before = 0
    for index in range(metadata.num_row_groups):
        num_rows = metadata.row_group(index).num_rows
        parts.append(Part(index, index, before, num_rows, num_rows))
        before += num_rows
    return parts


def read(path: Path, part: Part | None = None) -> Iterator[Row]:
    """All rows of the file or of a part of it. Few are in memory."""
    return parquet_rows(path, part) if is_parquet(path) else json_rows(path, part)


def json_rows(path: Path, part: Part | None) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        last = sys.maxsize
        if part is not None:
            file.seek(part.offset)
            number = part.num_before
            last = number + part.num_lines
        while number < last and (line := file.readline(MAX_LINE + 1)):
            number += 1
            if len(line) > MAX_LINE and not line.endswith(b"\n"):
                skip_line(file)
                yield Row(number, {}, f"the line has more than {MAX_LINE} bytes")
                continue
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                yield json_row(number, line)


def skip_line(file: BinaryIO) -> None:
    while piece := file.readline(1 << 20):
        if piece.endswith(b"\n"):
            return


def json_row(number: int, line: bytes) -> Row:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Row(number, {}, f"the line is not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"the line is no JSON: {error}")
    if not isinstance(record, dict):
        return Row(number, {}, f"the line is a JSON {type(record).__name__}; accepted is an object")
    return Row(number, record)


def parquet_rows(path: Path, part: Part | None) -> Iterator[Row]:
    number = 0 if part is None else part.num_before
    groups = None if part is None else [part.offset]
    for batch in parquet_file(path).iter_batches(batch_size=PARQUET_ROWS, row_groups=groups):
        for record in batch.to_pylist():
            number += 1
            yield Row(number, record)


def parquet_file(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValidationError(
            f"{path}: Parquet files need pyarrow; install it with pip install 'nanovllm[batch]'"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValidationError(f"{path} is no Parquet file: {error}") from error
