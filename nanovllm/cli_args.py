"""Engine arguments on the command line: fields of a dataclass <-> options of argparse.

Knows no field by name, except the short forms. Reads the annotations as text.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

SHORT_FORMS = {"tensor_parallel_size": "-tp", "data_parallel_size": "-dp"}


def add_options(
    parser: argparse.ArgumentParser, record: type, others: Iterable[str], default_model: str
) -> None:
    """One option for each field of `record`, such as --max-model-len for max_model_len.

    others: further names. Their options are hidden and take any literal of Python.
    """
    group = parser.add_argument_group("engine arguments")
    for field in fields(record):
        names = [option(field.name)]
        if field.name in SHORT_FORMS:
            names.append(SHORT_FORMS[field.name])
        default = default_model if field.default is MISSING else field.default
        group.add_argument(*names, default=default, **reading(field))
    for name in sorted(others):
        group.add_argument(
            option(name),
            nargs="?",
            const=True,
            default=None,
            type=literal,
            help=argparse.SUPPRESS,
        )


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def reading(field: Field[object]) -> dict[str, Any]:
    """How argparse reads the values of a field, by its annotation."""
    annotation = str(field.type)
    words = annotation.replace("[", " ").replace("]", " ").split()
    if "bool" in words and "str" not in words:
        return {"action": argparse.BooleanOptionalAction}
    if "bool" in words:  # such as --hf-token, with and without a value
        return {"nargs": "?", "const": True}
    if annotation.startswith("dict"):
        return {"type": json.loads}
    if words[0] == "Sequence":
        numbers = {"type": int} if "int" in words else {}
        return {"nargs": "+", **numbers}
    if "int" in words:
        return {"type": int}
    if "float" in words:
        return {"type": float}
    return {}


def literal(text: str) -> object:
    """A value of JSON or Python, or else the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def chosen(args: argparse.Namespace, record: type, others: Iterable[str]) -> dict[str, object]:
    """The values of the options in `args`. Options of the script itself are left out."""
    names = [*(field.name for field in fields(record)), *others]
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}
