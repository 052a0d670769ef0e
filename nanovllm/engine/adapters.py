"""The LoRA adapters of an engine: which are known, which are in memory. Knows no tensor."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Protocol

from nanovllm.core.adapter import Adapter, Files
from nanovllm.errors import ValidationError
from nanovllm.lora.request import LoRARequest


class AdapterMemory(Protocol):
    """Where the weights of adapters lie: on every rank."""

    def find(self, request: LoRARequest) -> Files:
        """The adapter's files. Raises ValueError for files that do not suit."""

    def files(self, folder: str) -> Files:
        """The files in the folder now."""

    def load(self, number: int, folder: str) -> None:
        """Reads the weights."""

    def unload(self, number: int) -> None:
        """Frees the weights."""


class Adapters:
    """Invariant: at most `max_cpu_loras` adapters are loaded, and a running one is.

    `known` holds the adapters by lora_int_id, the least recently used first. An adapter
    that is known and not loaded has waiting sequences, or is dropped before the next one
    becomes known.
    """

    def __init__(
        self,
        memory: AdapterMemory,
        in_use: Callable[[], AbstractSet[Adapter | None]],
        *,
        max_loras: int,
        max_cpu_loras: int,
    ) -> None:
        """in_use: returns the adapters of all unfinished sequences."""
        self.memory = memory
        self.in_use = in_use
        self.max_loras = max_loras
        self.max_cpu_loras = max_cpu_loras
        self.known: OrderedDict[int, Adapter] = OrderedDict()
        self.numbers = itertools.count(1)

    def loaded(self) -> list[Adapter]:
        """The adapters in memory, the least recently used first."""
        return [adapter for adapter in self.known.values() if adapter.is_loaded]

    def get(self, request: LoRARequest) -> Adapter:
        """The adapter of a request, known from now on. Raises ValueError as `find` does."""
        adapter = self.find(request)
        self.keep(adapter)
        return adapter

    def find(self, request: LoRARequest) -> Adapter:
        """The adapter of a request. Changes nothing. Checks the files of a new adapter.

        Raises ValueError for files that do not suit, for a number that another adapter
        has, and for new files of an adapter that unfinished requests use.
        """
        number = request.lora_int_id
        known = self.known.get(number)
        if known is not None and not self._is_stale(known, request):
            return known
        files = self.memory.find(request)
        if known is not None:
            self._check_unused(known)
        return Adapter(request, next(self.numbers), files)

    def keep(self, adapter: Adapter) -> None:
        """Makes an adapter that `find` returned known. It replaces the one of its lora_int_id."""
        number = adapter.request.lora_int_id
        known = self.known.get(number)
        if known is not adapter:
            if known is not None:
                self.remove(number)
            self._forget_unused()
            self.known[number] = adapter
        self.known.move_to_end(number)

    def adopt(self, given: Adapter) -> Adapter:
        """Our record of an adapter that another process knows by the same number."""
        known = self.known.get(given.request.lora_int_id)
        if known is not None and known.number == given.number:
            return known
        adapter = Adapter(given.request, given.number, given.files)
        self.keep(adapter)
        return adapter

    def _forget_unused(self) -> None:
        used = self.in_use()
        for number, adapter in list(self.known.items()):
            if not adapter.is_loaded and adapter not in used:
                del self.known[number]

    def _is_stale(self, known: Adapter, request: LoRARequest) -> bool:
        """Whether the files of a known adapter must be read again for this request."""
        if request.load_inplace:
            is_same_call = known.request is request and known in self.in_use()
            return not is_same_call
        is_kept = known.is_loaded or known in self.in_use()
        has_other_path = request.lora_path not in ("", known.request.lora_path)
        if is_kept and has_other_path:
            raise ValidationError(
                f"lora_int_id={request.lora_int_id} is the adapter at "
                f"{known.request.lora_path!r}, and lora_path={request.lora_path!r}; give the "
                "adapter another number, or load_inplace=True"
            )
        return not is_kept and (has_other_path or self._has_new_files(known))

    def _has_new_files(self, adapter: Adapter) -> bool:
        """Whether the files have changed since they were checked. Deleted files have not."""
        now = self.memory.files(adapter.files.folder)
        return now.is_there and now != adapter.files

    def may_join(self, adapter: Adapter | None, running: AbstractSet[Adapter | None]) -> bool:
        """Whether a sequence may run beside sequences of the adapters `running`.

        A sequence that nothing runs beside may always run, because `load` then says what
        is wrong.
        """
        if adapter is None or adapter in running:
            return True
        others = running - {None}
        pinned = {each for each in self.known.values() if each.is_pinned}
        together = len(others | pinned | {adapter})
        has_room = len(others) < self.max_loras and together <= self.max_cpu_loras
        return has_room or not others

    def load(self, adapter: Adapter, running: AbstractSet[Adapter | None]) -> None:
        """Brings an adapter into memory. Evicts the least recently used that do not run.

        Raises ValueError if all others are pinned or running, or for unreadable files.
        """
        self.known.move_to_end(adapter.request.lora_int_id)
        if adapter.is_loaded:
            return
        loaded = self.loaded()
        idle = [each for each in loaded if not each.is_pinned and each not in running]
        num_evicted = len(loaded) + 1 - self.max_cpu_loras
        if num_evicted > len(idle):
            raise ValidationError(
                f"adapter {adapter.request.lora_name!r} has no place: max_cpu_loras="
                f"{self.max_cpu_loras} adapters are pinned or running; remove one, or raise "
                "max_cpu_loras"
            )
        if self._has_new_files(adapter):  # cached prefixes are of the old files
            raise ValidationError(
                f"adapter {adapter.request.lora_name!r}: the files in {adapter.files.folder} have "
                "changed since they were checked; send the request again with load_inplace=True"
            )
        for each in idle[: max(num_evicted, 0)]:
            self._unload(each)
        self.memory.load(adapter.number, adapter.files.folder)
        adapter.is_loaded = True

    def pin(self, number: int, running: AbstractSet[Adapter | None]) -> None:
        """Loads the known adapter with this lora_int_id, and keeps it in memory.

        Raises ValueError as `load` does, and for an unknown adapter.
        """
        adapter = self.known_adapter(number)
        self.load(adapter, running)
        adapter.is_pinned = True

    def known_adapter(self, number: int) -> Adapter:
        """Raises ValueError if no adapter has this lora_int_id."""
        adapter = self.known.get(number)
        if adapter is None:
            known = sorted(self.known)
            raise ValidationError(f"lora_id={number!r} is not known; known are {known}")
        return adapter

    def _unload(self, adapter: Adapter) -> None:
        self.memory.unload(adapter.number)
        adapter.is_loaded = False

    def remove(self, number: int) -> bool:
        """Forgets the adapter with this lora_int_id. Returns whether it was known.

        Raises ValueError while an unfinished request uses the adapter.
        """
        adapter = self.known.get(number)
        if adapter is None:
            return False
        self._check_unused(adapter)
        if adapter.is_loaded:
            self._unload(adapter)
        del self.known[number]
        return True

    def _check_unused(self, adapter: Adapter) -> None:
        """Raises ValueError if an unfinished request uses the adapter."""
        if adapter in self.in_use():
            number = adapter.request.lora_int_id
            raise ValidationError(
                f"lora_int_id={number} is used by unfinished requests; finish or abort them first"
            )
