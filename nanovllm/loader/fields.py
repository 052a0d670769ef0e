"""Reads JSON files of settings. An error is a sentence that names file and field.

Does not know models: the caller names the fields and the values that it accepts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file. Raises ValueError for a file with any other content."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ValueError(
            f"{path} is not JSON ({cause(err)}); accepted is one JSON object {{...}}"
        ) from err
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds {json.dumps(found)[:80]}; accepted is one JSON object {{...}}"
        )
    return found


class Fields:
    """The fields of one file. A field that is null counts as missing.

    Every method takes the name of a field, and raises ValueError for a value of another
    type or range. `default` is the value of a missing field.
    """

    def __init__(self, source: str | Path, get: Callable[[str], Any]) -> None:
        """source: the file, for errors. get: the value of a field, None if it is missing.

        `get` returns Any, because JSON and the configs of transformers have no types.
        """
        self.source = source
        self.get = get

    def refuse(self, name: str, accepted: str) -> ValueError:
        """The error to raise for the value of a field."""
        value = self.get(name)
        has = "is missing or null" if value is None else f"is {shown(value)}"
        return ValueError(f"{self.source}: {name} {has}; accepted is {accepted}")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`."""
        value = self.get(name)
        if value is None:
            value = default
        if not is_integer(value) or value < least:
            raise self.refuse(name, f"an integer of at least {least}")
        return value

    def number(self, name: str, default: float | None = None, zero: bool = False) -> float:
        """A finite number above 0. With `zero`, 0 is accepted too."""
        value = self.get(name)
        if value is None:
            value = default
        if not is_number(value) or value < 0 or (value == 0 and not zero):
            raise self.refuse(name, "a number of at least 0" if zero else "a number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false. A missing field is false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return bool(value)

    def ids(self, name: str) -> list[int]:
        """One token id or a list of them. A missing field is []."""
        value = self.get(name)
        if value is None:
            return []
        given = list(value) if isinstance(value, (list, tuple)) else [value]
        found = [token for token in given if is_integer(token)]
        if len(found) < len(given):
            raise self.refuse(name, "a token id or a list of token ids")
        return found


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def field_at_fault(
    fields: dict[str, object], read: Callable[[dict[str, object]], object]
) -> str | None:
    """The first field without which `read` succeeds.

    None if there is no such field, or if `read` succeeds with all fields.
    """

    def fails(some: dict[str, object]) -> bool:
        try:
            read(some)
        except Exception:  # another library may raise any type
            return True
        return False

    if not fails(fields):
        return None
    for name in fields:
        others = {key: value for key, value in fields.items() if key != name}
        if not fails(others):
            return name
    return None


def shown(value: object) -> str:
    """A value as an error shows it: its repr, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def cause(err: BaseException) -> str:
    """An error of another library in one line."""
    lines = str(err).strip().splitlines() or ["no message"]
    # A first line that ends with a colon says nothing without the second line.
    text = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    return f"{type(err).__name__}: {text[:200]}"
