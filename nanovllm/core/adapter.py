"""A LoRA adapter that the engine knows. Neither its weights nor its requests."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.lora.request import LoRARequest


@dataclass(frozen=True)
class Files:
    """The files of an adapter at one time. Equal records stand for equal contents."""

    folder: str
    versions: tuple[tuple[int, int], ...]  # see loader/peft.py; () if a file is missing

    @property
    def is_there(self) -> bool:
        return bool(self.versions)


@dataclass(eq=False)
class Adapter:
    """Invariant: no other adapter of the engine ever had the same `number`.

    The number names the adapter on every rank, and seeds the hashes of its K/V. `files`
    were checked. `is_loaded`: the weights are in the memory of every rank.
    """

    request: LoRARequest
    number: int  # from 1
    files: Files
    is_loaded: bool = False
    is_pinned: bool = False
