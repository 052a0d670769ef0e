"""vLLM's protocol of logits processors that are classes, with vLLM's names.

An engine makes one object of each class, which sees the logits of whole batches. The
batch keeps its order from step to step; a `BatchUpdate` says what changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar

from nanovllm.sampling.request_processors import RowFunction, read_function
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch
    from torch import Tensor

State = TypeVar("State")

RemovedRequest = int  # the row that is empty now
# (row, params, prompt's token ids, generated token ids). The last list is the live one:
# it has each new token before the next `apply`.
AddedRequest = tuple[int, SamplingParams, list[int] | None, list[int]]


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = 1  # the first row's request goes to the second row
    SWAP = 2  # the two rows change places


MovedRequest = tuple[int, int, MoveDirectionality]


@dataclass(frozen=True)
class BatchUpdate:
    """How a batch differs from the last one. To be read in this order: removed, added, moved.

    A row that is added or moved to may have held another request.
    """

    batch_size: int
    removed: Sequence[RemovedRequest]
    added: Sequence[AddedRequest]
    moved: Sequence[MovedRequest]


class LogitsProcessor(ABC):
    """One object an engine. It changes the rows of the requests that ask for it."""

    @classmethod  # noqa: B027
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError for parameters that this class refuses."""

    @abstractmethod
    def __init__(
        self, vllm_config: SimpleNamespace, device: torch.device, is_pin_memory: bool
    ) -> None:
        """vllm_config: has `model_config` and `scheduler_config`."""

    @abstractmethod
    def apply(self, logits: Tensor) -> Tensor:
        """[batch_size, V] float32 -> the same shape. It may write into `logits`."""

    @abstractmethod
    def is_argmax_invariant(self) -> bool:
        """True: the largest logit of a row stays the largest, so greedy rows are left out.

        Such a processor applies after temperature and min-p.
        """

    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called once before each `apply`. None: the same requests in the same rows."""


class AdapterLogitsProcessor(LogitsProcessor):
    """Runs functions of single rows, as in SamplingParams(logits_processors=[...])."""

    def __init__(
        self, vllm_config: SimpleNamespace, device: torch.device, is_pin_memory: bool
    ) -> None:
        self.functions: dict[int, Callable[[Tensor], Tensor]] = {}  # row -> its function

    @abstractmethod
    def new_req_logits_processor(self, params: SamplingParams) -> RowFunction | None:
        """The function of a new request, or None."""

    def _new_function(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> Callable[[Tensor], Tensor] | None:
        found = self.new_req_logits_processor(params)
        if found is None:
            return None
        return partial(read_function(found), prompt_ids or [], output_ids)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.functions, batch_update, self._new_function)

    def apply(self, logits: Tensor) -> Tensor:
        for row, function in self.functions.items():
            logits[row] = function(logits[row])
        return logits


def process_dict_updates(
    req_entries: dict[int, State],
    batch_update: BatchUpdate | None,
    new_state: Callable[[SamplingParams, list[int] | None, list[int]], State | None],
) -> bool:
    """Keeps `req_entries`, row -> state, up to date. Returns whether it changed.

    new_state: makes the state of an added request; None for a request without one.
    """
    if batch_update is None:
        return False
    before = dict(req_entries)
    for row in batch_update.removed:
        req_entries.pop(row, None)
    for row, params, prompt_ids, output_ids in batch_update.added:
        req_entries.pop(row, None)
        state = new_state(params, prompt_ids, output_ids)
        if state is not None:
            req_entries[row] = state
    for start, end, direction in batch_update.moved:
        moved = req_entries.pop(start, None)
        replaced = req_entries.pop(end, None)
        if moved is not None:
            req_entries[end] = moved
        if replaced is not None and direction is MoveDirectionality.SWAP:
            req_entries[start] = replaced
    return req_entries != before
