"""The LoRA adapters in the memory of one rank, and which rows of a step use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from nanovllm.core.batch import Batch, ceil_div
from nanovllm.core.lora import LoRAPart
from nanovllm.layers.linear import Matrix
from nanovllm.layers.moe import ExpertMatrices
from nanovllm.loader.peft import LowRank, read_adapter
from nanovllm.loader.source import Source
from nanovllm.models.base import LanguageModel
from nanovllm.parallel import TensorParallel
from nanovllm.runner.setup import Setup
from nanovllm.weights.lora import Factors, Group, LoRARows, LoRAWeight, change


@dataclass
class Place:
    """Where the projection of a checkpoint lies: its slice is in the rows from `first` on."""

    weight: LoRAWeight
    shape: tuple[int, int]  # of the whole checkpoint matrix
    rows: slice  # of the checkpoint matrix
    columns: slice
    first: int


class ModelAdapters:
    """Wraps every matrix of a model, and fills the wrappers with adapters."""

    def __init__(self, model: LanguageModel, setup: Setup, tp: TensorParallel) -> None:
        self.setup = setup
        self.tp = tp
        self.rows = LoRARows()
        # Module name in checkpoints -> its places. A fused projection has one a piece.
        self.places: dict[str, list[Place]] = {}
        for prefix, module in model.named_modules():
            if isinstance(module, Matrix) and not isinstance(module, ExpertMatrices):
                sources = module.sources(prefix)
                module.storage = LoRAWeight(module.storage, self.rows)
                for name, place in places(module.storage, sources):
                    self.places.setdefault(name, []).append(place)
        head = model.head.storage
        assert isinstance(head, LoRAWeight)
        tied = [found for found in self.places.values() if found[0].weight is head]
        self.places.setdefault("lm_head", tied[0])

    def read(self, folder: str) -> dict[str, LowRank]:
        """The changes in an adapter's files, checked. Raises ValueError if they do not suit."""
        shapes = {name: found[0].shape for name, found in self.places.items()}
        return read_adapter(Path(folder), shapes, self.setup.args.max_lora_rank)

    def load(self, number: int, folder: str) -> None:
        """Reads an adapter and calls it `number`. A failure leaves nothing of it."""
        by_weight: dict[tuple[LoRAWeight, bool], list[Factors]] = {}
        for name, low_rank in self.read(folder).items():
            for place in self.places[name]:
                factors = by_weight.setdefault((place.weight, low_rank.is_embedding), [])
                factors.append(self._factors(place, low_rank))
        made = {key: change(factors, key[1]) for key, factors in by_weight.items()}
        for (weight, is_embedding), each in made.items():
            changes = weight.embedding_changes if is_embedding else weight.linear_changes
            changes[number] = each

    def unload(self, number: int) -> None:
        for found in self.places.values():
            found[0].weight.linear_changes.pop(number, None)
            found[0].weight.embedding_changes.pop(number, None)

    def _factors(self, place: Place, low_rank: LowRank) -> Factors:
        """This rank's slices. The second factor is scaled."""
        if low_rank.is_embedding:
            a = low_rank.a[:, place.rows]
            padding = ceil_div(place.shape[0], self.tp.size) - a.shape[1]
            a = pad(a, (0, padding))
            b = low_rank.b[...]
        else:
            a = low_rank.a[:, place.columns]
            b = low_rank.b[place.rows]
        return Factors(self._stored(a, 1.0), self._stored(b, low_rank.scale), place.first)

    def _stored(self, factor: Tensor, scale: float) -> Tensor:
        """A factor in lora_dtype's precision and the model's dtype, on the device."""
        scaled = factor.float() * scale
        name = self.setup.args.lora_dtype
        dtype = self.setup.dtype if name == "auto" else getattr(torch, name)
        return scaled.to(dtype).to(self.setup.device, self.setup.dtype)

    def num_bytes(self) -> int:
        """Bytes of an adapter of rank max_lora_rank for every matrix."""
        sizes = [sum(place.shape) for found in self.places.values() for place in found]
        return sum(sizes) * self.setup.args.max_lora_rank * self.setup.dtype.itemsize

    @contextmanager
    def rows_of(self, batch: Batch[np.ndarray]) -> Iterator[None]:
        """Inside the `with` the matrices know the adapters of the batch's tokens."""
        part = batch.parts.get("lora")
        if not isinstance(part, LoRAPart):
            yield
        else:
            with self.rows.of(self._groups(part)):
                yield

    def _groups(self, part: LoRAPart[np.ndarray]) -> list[Group]:
        if part.only:
            return [Group(part.only, None)]
        groups = []
        for adapter in np.unique(part.of_tokens).tolist():
            rows = torch.from_numpy(np.flatnonzero(part.of_tokens == adapter))
            groups.append(Group(adapter, rows.to(self.setup.device)))
        return [group for group in groups if group.adapter]


def places(weight: LoRAWeight, sources: list[Source]) -> Iterator[tuple[str, Place]]:
    """(module name, place) of each projection. They fill the rows one after the other."""
    first = 0
    for source in sources:
        name, _, kind = source.name.rpartition(".")
        if kind == "weight":
            rows, columns = source.part
            num_rows, num_columns = source.shape
            yield name, Place(weight, (num_rows, num_columns), rows, columns, first)
            first += len(range(*rows.indices(num_rows)))
