"""A LoRA adapter that the engine knows. Neither its weights nor its requests."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.lora.request import LoRARequest


@dataclass(eq=False)
class Adapter:
    """Invariant: no other adapter of the engine ever had the same `number`.

    The number names the adapter on every rank, and seeds the hashes of its K/V. `folder`
    holds the files. `is_loaded`: the weights are in the memory of every rank.
    """

    request: LoRARequest
    number: int  # from 1
    folder: str
    is_loaded: bool = False
    is_pinned: bool = False
