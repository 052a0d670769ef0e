"""How checkpoint tensors find their parameters: every layer lists which part of which tensor fills which part of it.

So fused and sharded parameters are filled slice by slice, and a rank reads no more than its shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

COPY_AT_ONCE = 1 << 22  # numbers


class Source(NamedTuple):
    """`into` is filled by the slices `part` of the checkpoint tensor `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    part: tuple[slice, ...]
    into: Tensor


def fill(model: nn.Module, weights: Iterable[tuple[str, Any]]) -> set[str]:
    """Fills parameters in place from (name, tensor or lazy tensor) pairs; returns the names of those given.

    Raises ValueError for a tensor that the model does not know or whose shape is another.
    """
    wanted = all_sources(model)
    given, unknown = set(), []
    tied = "lm_head.weight" not in wanted
    for name, tensor in weights:
        if name not in wanted:
            if not (tied and name == "lm_head.weight"):  # a copy of the embedding
                unknown.append(name)
            continue
        for source in wanted[name]:
            if tuple(tensor.shape) != source.shape:
                raise ValueError(
                    f"checkpoint: tensor {name} has shape {list(tensor.shape)}, the config asks for {list(source.shape)}"
                )
            copy_part(source.into.data, tensor, source.part)
        given.add(name)
    if unknown:
        raise ValueError(f"checkpoint: the model has no parameter for {listing(unknown)}")
    return given


def copy_part(into: Tensor, tensor: Any, part: tuple[slice, ...]) -> None:
    """into.copy_(tensor[part]) by some rows at a time: the embedding of a large vocabulary is not there twice."""
    start, stop, _ = part[0].indices(tensor.shape[0])
    rows = max(1, COPY_AT_ONCE // max(1, math.prod(tensor.shape[1:])))
    for a in range(start, stop, rows):
        b = min(a + rows, stop)
        piece = (slice(a, b), *part[1:])
        into[a - start : b - start].copy_(tensor[piece])


def all_sources(model: nn.Module) -> dict[str, list[Source]]:
    """Checkpoint name -> what it fills."""
    found: dict[str, list[Source]] = {}
    for prefix, module in model.named_modules():
        for source in module.sources(prefix) if hasattr(module, "sources") else ():
            found.setdefault(source.name, []).append(source)
    return found


def listing(names: Iterable[str], most: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
