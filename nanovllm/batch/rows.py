"""Input files -> rows, one at a time: JSON lines and Parquet. Knows no format of requests."""

from __future__ import annotations

import json
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
class InputFile:
    """What one pass over an input finds."""

    path: Path
    num_rows: int
    digest: str  # of all bytes


def is_parquet(path: Path) -> bool:
    return path.suffix in (".parquet", ".pq")


def scan(path: Path) -> InputFile:
    """Reads the whole file once. Lines without text are no rows."""
    digest = xxhash.xxh3_128()
    if is_parquet(path):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return InputFile(path, parquet_file(path).metadata.num_rows, digest.hexdigest())
    num_rows = 0
    with path.open("rb") as file:
        has_text = False
        while piece := file.readline(1 << 20):
            digest.update(piece)
            has_text = has_text or bool(piece.strip())
            if piece.endswith(b"\n"):
                num_rows += has_text
                has_text = False
        num_rows += has_text
    return InputFile(path, num_rows, digest.hexdigest())


def read(path: Path) -> Iterator[Row]:
    """All rows, of which few are in memory."""
    return parquet_rows(path) if is_parquet(path) else json_rows(path)


def json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
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


def parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    for batch in parquet_file(path).iter_batches(batch_size=PARQUET_ROWS):
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
