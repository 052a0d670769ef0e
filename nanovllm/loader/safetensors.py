"""Safetensors checkpoints, one file or several: every tensor by its name, read from disk only where it is sliced.

This file does not know which names a model wants.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm.loader.fields import read_object

INDEX = "model.safetensors.index.json"

# The names of the format's header: https://huggingface.co/docs/safetensors
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
}


class SafetensorsTensor:
    """A tensor on disk: slicing it reads that part."""

    def __init__(self, name: str, part: Any) -> None:
        self.part = part
        self.shape: tuple[int, ...] = tuple(part.get_shape())
        if part.get_dtype() not in DTYPES:
            raise ValueError(
                f"checkpoint: tensor {name} is stored as {part.get_dtype()}, which is not known; "
                "accepted are F32, F16 and BF16"
            )
        self.dtype = DTYPES[part.get_dtype()]

    def __getitem__(self, index: Any) -> Tensor:
        return self.part[index]


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's files: model.safetensors, else those that the index names, else all there are (maybe none)."""
    if (single := folder / "model.safetensors").is_file():
        return [single]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(weight_map(folder).values()))]
    # Mistral's repositories hold the same weights a second time, under names of their own.
    return sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated"))


def weight_map(folder: Path) -> dict[str, str]:
    """The index: name of a tensor -> name of the file that holds it."""
    path = folder / INDEX
    try:
        found = read_object(path).get("weight_map")
    except ValueError as err:
        raise ValueError(f"{path} is not a checkpoint index ({err}); fetch it again") from err
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{path} is not a checkpoint index: it has no weight_map of file names; fetch it again")
    return found


def iter_tensors(folder: Path) -> Iterator[tuple[str, SafetensorsTensor]]:
    """Every tensor once, file by file; one that lies in several files is taken from the one that the index names.

    Raises ValueError, naming the file, for one that is missing, cut short, or not in this format.
    """
    files = weight_files(folder)
    wanted = weight_map(folder) if len(files) > 1 and (folder / INDEX).is_file() else {}
    seen: set[str] = set()
    for path in files:
        handle = open_file(path)
        for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
            if name not in seen and wanted.get(name, path.name) == path.name:
                seen.add(name)
                yield name, SafetensorsTensor(name, handle.get_slice(name))
    if missing := sorted(wanted.keys() - seen):
        raise ValueError(
            f"{folder / wanted[missing[0]]} lacks {missing[0]!r}, which {INDEX} places there "
            f"({len(missing)} tensors are missing in all); fetch the model again"
        )


def open_file(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} is missing, though {INDEX} names it; fetch the model again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as err:
        raise unreadable(path, "safetensors", err) from err


def unreadable(path: Path, format: str, err: Exception) -> ValueError:
    """The error to raise for a file in which `err` came up."""
    with path.open("rb") as file:
        pointer = file.read(20) == b"version https://git-"
    cause = "it is a Git LFS pointer, the weights were not fetched: run git lfs pull" if pointer else err
    return ValueError(
        f"{path} ({path.stat().st_size:,} bytes) cannot be read as {format}: {cause}; "
        "a file that was cut short or damaged must be fetched again"
    )
