"""The names of the parts of a split GGUF file. Does not know what the parts hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

# The name of a part of a split GGUF file: the part's number, from 1, and the number of
# parts.
PART_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.(?i:gguf))")


def part_path(path: Path, number: int, count: int) -> Path:
    """The path of part `number`, from 0, of the split file that `path` belongs to."""
    match = PART_NAME.fullmatch(path.name)
    stem, suffix = (path.stem, path.suffix) if match is None else match.group("stem", "suffix")
    return path.with_name(f"{stem}-{number + 1:05}-of-{count:05}{suffix}")


def without_later_parts(paths: Iterable[Path]) -> list[Path]:
    """The paths in order, and of each split file only the first part that is given."""
    found: dict[Path, Path] = {}
    for path in sorted(paths):
        match = PART_NAME.fullmatch(path.name)
        first = path if match is None else part_path(path, 0, int(match["count"]))
        found.setdefault(first, path)
    return list(found.values())


def parts_pattern(name: str) -> str:
    """A pattern (fnmatch) of the names of all parts of a file. A whole file has its own name."""
    match = PART_NAME.fullmatch(name)
    if match is None:
        return name
    return f"{match['stem']}-?????-of-{match['count']}{match['suffix']}"


def find_parts(path: Path, number: int, count: int) -> list[Path]:
    """The paths of all parts of a split file, in order. [path] for a whole file.

    path: the part `number`. Raises ValueError that names a part that is missing.
    """
    if count == 1:
        return [path]
    parts = [part_path(path, at, count) for at in range(count)]
    if number >= count or path != parts[number]:
        raise ValueError(
            f"{path} is part {number + 1} of {count} by its metadata (split.no, split.count); give "
            f"the file the name that llama.cpp gives such a part: {part_path(path, number, count)}"
        )
    for part in parts:
        if not part.is_file():
            raise ValueError(
                f"{path} is one of {count} parts of a split file, and {part} is missing; put all "
                "parts into one folder"
            )
    return parts
