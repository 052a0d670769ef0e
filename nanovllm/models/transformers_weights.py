"""Checkpoint names to the names of transformers' modules, by transformers' own tables.

transformers renames, splits and joins tensors of some families while it loads them. A
tensor that only gets another name stays unread. Others are read and converted, one group
at a time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.loader.source import LazyTensor, listing

logger = logging.getLogger("nanovllm")


def renamed(
    hf: nn.Module, weights: Iterable[tuple[str, LazyTensor]], wanted: dict[str, list[str]]
) -> Iterator[tuple[str, LazyTensor]]:
    """(name in the model, tensor) of each tensor that the model has, each name once.

    wanted: each name of transformers' model, and the names that its tensor fills. Logs the
    names that the model does not have, as transformers does.
    """
    table = Conversions(hf, wanted)
    unknown: list[str] = []
    seen: set[str] = set()
    for name, tensor in weights:
        target = name if name in wanted else table.take(name, tensor)
        if target is None:
            unknown.append(name)
        for each in new_ones(wanted.get(target or "", []), seen):
            yield each, tensor
    for target, converted in table.converted():
        if target not in wanted:
            unknown.append(target)
        for each in new_ones(wanted.get(target, []), seen):
            yield each, converted
    report_unknown(hf, unknown)


def new_ones(names: list[str], seen: set[str]) -> list[str]:
    """The names that are not in `seen`, which gets them. A checkpoint may have both of a tie."""
    found = [name for name in names if name not in seen]
    seen.update(found)
    return found


def report_unknown(hf: nn.Module, names: list[str]) -> None:
    patterns = getattr(hf, "_keys_to_ignore_on_load_unexpected", None) or ()
    names = [name for name in names if not any(re.search(each, name) for each in patterns)]
    if names:
        logger.warning(
            "checkpoint: the model of transformers has no parameter for %s; they are not used",
            listing(names),
        )


class Conversions:
    """The tables of one model.

    Invariant: `groups` holds the tensors whose conversion waits for others.
    """

    def __init__(self, hf: nn.Module, wanted: dict[str, list[str]]) -> None:
        self.hf: Any = hf  # transformers has no types
        self.wanted = wanted
        self.groups: dict[str, Any] = {}  # first target -> a WeightConverter with its tensors
        self.patterns = patterns_of(hf)
        self.renamings: list[Any] = []
        self.converters: list[Any] = []
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError:
            return  # transformers 4 has patterns only
        table = get_model_conversion_mapping(hf)
        self.renamings = [each for each in table if isinstance(each, WeightRenaming)]
        self.converters = [each for each in table if isinstance(each, WeightConverter)]

    def take(self, name: str, tensor: LazyTensor) -> str | None:
        """The name in the model. "" for a tensor that waits for its conversion.

        None if the model has no such tensor.
        """
        for old, new in self.patterns:
            name = re.sub(old, new, name)
        target, pattern = self.target(name)
        if target not in self.wanted:
            target, pattern = self.with_prefix(name), None
        if target not in self.wanted:
            return None
        if pattern is None:
            return target
        if target not in self.groups:
            by_pattern = {p: each for each in self.converters for p in each.source_patterns}
            self.groups[target] = deepcopy(by_pattern[pattern])
        self.groups[target].add_tensor(target, name, pattern, lambda: tensor[...])
        return ""

    def target(self, name: str) -> tuple[str, str | None]:
        """(name in the model, pattern of the conversion or None)."""
        if not self.renamings and not self.converters:
            return self.with_prefix(name), None
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self.renamings, self.converters)
        return self.with_prefix(target), pattern

    def with_prefix(self, name: str) -> str:
        """A checkpoint of the body alone has no prefix, and one of a larger model has one."""
        prefix = f"{self.hf.base_model_prefix}."
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in self.wanted:
                return candidate
        return name

    def converted(self) -> Iterator[tuple[str, Tensor]]:
        """The results of the conversions. Each group is read when its turn comes."""
        for target in list(self.groups):
            group = self.groups.pop(target)
            found = group.convert(target, model=self.hf, config=self.hf.config)
            for name, tensor in found.items():
                tensor = tensor[0] if isinstance(tensor, list) else tensor
                yield name, torch.as_tensor(tensor)


def patterns_of(hf: nn.Module) -> list[tuple[str, str]]:
    """The renamings of transformers 4: a class attribute."""
    table = getattr(hf, "_checkpoint_conversion_mapping", None) or {}
    return [(pattern, to) for pattern, to in table.items() if isinstance(to, str)]
