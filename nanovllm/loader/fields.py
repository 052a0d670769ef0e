"""Reading JSON files of settings: each error is one sentence that names the file and the field.

Knows no model: callers say which fields they read and which values they accept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError for a file that holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ValueError(f"{path} is not JSON ({cause(err)}); accepted is one JSON object {{...}}") from err
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {json.dumps(found)[:80]}; accepted is one JSON object {{...}}")
    return found


class Fields:
    """The fields of one file. A field that is null counts as missing.

    Every method raises ValueError for a value of another type or range; `default` is for a missing field.
    """

    def __init__(self, source: str | Path, get: Callable[[str], Any]) -> None:
        """`get(name)` is the value as the file has it; None where the field is missing."""
        self.source = source
        self.get = get

    def refuse(self, name: str, accepted: str) -> ValueError:
        """The error to raise for the value of a field."""
        value = self.get(name)
        has = "is missing or null" if value is None else f"is {shown(value)}"
        return ValueError(f"{self.source}: {name} {has}; accepted is {accepted}")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value: Any = self.get(name)
        value = default if value is None else value
        if not is_integer(value) or value < least:
            raise self.refuse(name, f"an integer of at least {least}")
        return value

    def number(self, name: str, default: float | None = None, zero: bool = False) -> float:
        """A finite number above 0; or 0 itself, with `zero`."""
        value: Any = self.get(name)
        value = default if value is None else value
        if not is_number(value) or value < 0 or (value == 0 and not zero):
            raise self.refuse(name, "a number of at least 0" if zero else "a number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false where the field is missing."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return bool(value)

    def ids(self, name: str) -> list[int]:
        """One token id or a list of them; [] where the field is missing."""
        value = self.get(name)
        found = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
        if not all(is_integer(token) for token in found):
            raise self.refuse(name, "a token id or a list of token ids")
        return list(found)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def field_at_fault(fields: dict[str, Any], read: Callable[[dict[str, Any]], object]) -> str | None:
    """The first field without which `read` succeeds; None where there is none, or where `read` succeeds with all."""

    def fails(some: dict[str, Any]) -> bool:
        try:
            read(some)
        except Exception:  # another library's error, of any type
            return True
        return False

    if not fails(fields):
        return None
    without = ({key: value for key, value in fields.items() if key != name} for name in fields)
    return next((name for name, some in zip(fields, without) if not fails(some)), None)


def shown(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def cause(err: BaseException) -> str:
    """An error of another library in a line."""
    lines = str(err).strip().splitlines() or ["no message"]
    text = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    return f"{type(err).__name__}: {text[:200]}"
