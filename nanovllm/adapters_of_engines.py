"""The LoRA adapters of data parallelism: one list here, and the weights on each engine.

This process numbers the adapters. An engine loads an adapter when its first request
comes, and decides by itself which others stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Protocol

from nanovllm.config import EngineArgs
from nanovllm.core.adapter import Adapter, Files
from nanovllm.engine.adapters import Adapters
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.loader.peft import versions
from nanovllm.lora.request import LoRARequest


class CallEngines(Protocol):
    """`function(engine, *args)` in the processes of these engines. None stands for all."""

    def __call__(
        self, function: Callable[..., object], *args: object, engines: list[int] | None = None
    ) -> list[object]: ...


class AdaptersOfEngines(Adapters):
    """Invariant: a known adapter counts as loaded, because some engine may have its weights."""

    def __init__(
        self,
        call: CallEngines,
        in_use: Callable[[], AbstractSet[Adapter | None]],
        args: EngineArgs,
    ) -> None:
        """in_use: returns the adapters of all unfinished requests."""
        super().__init__(
            MemoryOfEngines(call),
            in_use,
            max_loras=args.max_loras,
            max_cpu_loras=args.num_adapters,
        )
        self.call = call

    def keep(self, adapter: Adapter) -> None:
        super().keep(adapter)
        adapter.is_loaded = True

    def load(self, adapter: Adapter, running: AbstractSet[Adapter | None]) -> None:
        """Brings an adapter into the memory of every engine. Raises the first engine's error."""
        self.call(load_adapter, adapter)

    def pin(self, number: int, running: AbstractSet[Adapter | None]) -> None:
        """Keeps a known adapter in the memory of every engine."""
        self.call(pin_adapter, self.known_adapter(number))


class MemoryOfEngines:
    """Checks adapters on the first engine, because all engines read the same files."""

    def __init__(self, call: CallEngines) -> None:
        self.call = call

    def find(self, request: LoRARequest) -> Files:
        (files,) = self.call(find_files, request, engines=[0])
        assert isinstance(files, Files)
        return files

    def files(self, folder: str) -> Files:
        return Files(folder, versions(Path(folder)))

    def load(self, number: int, folder: str) -> None:
        raise AssertionError("AdaptersOfEngines.load calls the engines")

    def unload(self, number: int) -> None:
        self.call(forget_adapter, number)


# -- in an engine's process ------------------------------------------------------------------------


def adapters_of(engine: LLMEngine) -> Adapters:
    assert engine.adapters is not None, "the engine has enable_lora=True"
    return engine.adapters


def find_files(engine: LLMEngine, request: LoRARequest) -> Files:
    return adapters_of(engine).memory.find(request)


def load_adapter(engine: LLMEngine, adapter: Adapter) -> None:
    adapters = adapters_of(engine)
    adapters.load(adapters.adopt(adapter), engine.running_adapters())


def pin_adapter(engine: LLMEngine, adapter: Adapter) -> None:
    adapters_of(engine).adopt(adapter)
    engine.pin_lora(adapter.request.lora_int_id)


def forget_adapter(engine: LLMEngine, number: int) -> None:
    """number: of the adapter. The engine may not know it."""
    adapters = adapters_of(engine)
    for lora_id, adapter in list(adapters.known.items()):
        if adapter.number == number:
            adapters.remove(lora_id)
