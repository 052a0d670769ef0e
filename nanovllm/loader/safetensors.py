"""Safetensors checkpoints, one file or several. A tensor is found by its name, and a
slice of it is read from disk when it is asked for.

Does not know which names a model needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nanovllm.loader.fields import read_object
from nanovllm.loader.source import Part

if TYPE_CHECKING:
    from safetensors import safe_open

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


class StoredTensor(Protocol):
    """What `safe_open(...).get_slice(name)` returns.

    Slicing reads that part of the file.
    """

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, part: Part, /) -> Tensor: ...


class SafetensorsTensor:
    """A tensor on disk. Slicing it reads that part."""

    def __init__(self, name: str, stored: StoredTensor) -> None:
        self.stored = stored
        self.shape: tuple[int, ...] = tuple(stored.get_shape())
        if stored.get_dtype() not in DTYPES:
            raise ValueError(
                f"checkpoint: tensor {name} is stored as {stored.get_dtype()}, which is not known; "
                "accepted are F32, F16 and BF16"
            )
        self.dtype = DTYPES[stored.get_dtype()]

    def __getitem__(self, part: Part, /) -> Tensor:
        return self.stored[part]


def weight_files(folder: Path) -> list[Path]:
    """The files of the checkpoint: model.safetensors, or else the files of the index.

    Without an index: all safetensors files in the folder. The list may be empty.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(weight_map(folder).values()))]
    # Mistral's repositories store the same weights a second time, under other names.
    return sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated"))


def weight_map(folder: Path) -> dict[str, str]:
    """The index: name of a tensor -> name of its file."""
    path = folder / INDEX
    try:
        found = read_object(path).get("weight_map")
    except ValueError as err:
        raise ValueError(f"{path} is not a checkpoint index ({err}); fetch it again") from err
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(
            f"{path} is not a checkpoint index: it has no weight_map of file names; fetch it again"
        )
    return found


def iter_tensors(folder: Path) -> Iterator[tuple[str, SafetensorsTensor]]:
    """(name, tensor) of every tensor, file by file, each name once.

    If a name is in several files, the file that the index names counts. Raises ValueError
    that names the file if it is missing, cut short or in another format.
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
    missing = sorted(wanted.keys() - seen)
    if missing:
        raise ValueError(
            f"{folder / wanted[missing[0]]} lacks {missing[0]!r}, which {INDEX} places there "
            f"({len(missing)} tensors are missing in all); fetch the model again"
        )


def open_file(path: Path) -> safe_open:
    """Reads the header of a file. Raises ValueError if the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} is missing, though {INDEX} names it; fetch the model again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as err:
        raise unreadable(path, "safetensors", err) from err


def unreadable(path: Path, format: str, err: Exception) -> ValueError:
    """The error to raise for a file whose reading raised `err`."""
    with path.open("rb") as file:
        is_pointer = file.read(20) == b"version https://git-"
    cause = str(err)
    if is_pointer:
        cause = "it is a Git LFS pointer, the weights were not fetched: run git lfs pull"
    return ValueError(
        f"{path} ({path.stat().st_size:,} bytes) cannot be read as {format}: {cause}; "
        "a file that was cut short or damaged must be fetched again"
    )
