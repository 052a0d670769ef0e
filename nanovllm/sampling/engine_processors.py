"""`LLM(logits_processors=[...])`: classes of the user, one object of each an engine.

Every request of the engine is shown to the objects (interface.py). Their state follows
the batch, so a step with them waits for the tokens of the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from nanovllm.core.ability import ModelFacts
from nanovllm.core.batch import HostOnly, Part
from nanovllm.core.sequence import SequenceTable
from nanovllm.core.step import Array
from nanovllm.errors import ValidationError
from nanovllm.sampling import interface
from nanovllm.sampling.base import LogitsProcessor
from nanovllm.sampling.interface import BatchUpdate, MoveDirectionality, MovedRequest
from nanovllm.sampling_params import SamplingParams

METHODS = ("apply", "is_argmax_invariant", "update_state")


@dataclass
class Member:
    """One sequence of a step: what the objects may know of it."""

    seq_id: int
    params: SamplingParams
    prompt_len: int
    tokens: np.ndarray  # int32, the prompt first


@dataclass
class UserObjects:
    """An engine's objects. Invariant: row i of the logits that they see is sequence `rows[i]`."""

    objects: list[interface.LogitsProcessor]
    rows: list[int] = field(default_factory=list)  # ids of sequences
    outputs: dict[int, list[int]] = field(default_factory=dict)  # id -> generated tokens

    def __reduce__(self) -> tuple[object, ...]:
        """Nothing is pickled, because each process has its own objects."""
        return UserObjects, ([],)

    def follow(self, members: Sequence[Member]) -> list[int]:
        """Shows the objects who is in this step. Returns the index of each row's member."""
        index = {member.seq_id: i for i, member in enumerate(members)}
        for member in members:
            output = self.outputs.setdefault(member.seq_id, [])
            output += member.tokens[member.prompt_len + len(output) :].tolist()
        update = self._update(members, index)
        for processor in self.objects:
            processor.update_state(update)
        return [index[seq_id] for seq_id in self.rows]

    def _update(self, members: Sequence[Member], index: dict[int, int]) -> BatchUpdate | None:
        empty = [row for row, seq_id in enumerate(self.rows) if seq_id not in index]
        known = set(self.rows)
        new = [member for member in members if member.seq_id not in known]
        if not empty and not new:
            return None
        for row in empty:
            del self.outputs[self.rows[row]]
        added = []
        for member in new:  # into empty rows first
            if empty:
                row = empty.pop(0)
                self.rows[row] = member.seq_id
            else:
                row = len(self.rows)
                self.rows.append(member.seq_id)
            prompt_ids = member.tokens[: member.prompt_len].tolist()
            added.append((row, member.params, prompt_ids, self.outputs[member.seq_id]))
        removed, moved = self._close_gaps(empty)
        return BatchUpdate(len(self.rows), removed, added, moved)

    def _close_gaps(self, empty: list[int]) -> tuple[list[int], list[MovedRequest]]:
        """Moves the last rows into the empty ones: (rows that stay empty, moves)."""
        removed: list[int] = []
        moved: list[MovedRequest] = []
        while empty:
            last = len(self.rows) - 1
            seq_id = self.rows.pop()
            if last == empty[-1]:
                empty.pop()
                removed.append(last)
            else:
                row = empty.pop(0)
                self.rows[row] = seq_id
                moved.append((last, row, MoveDirectionality.UNIDIRECTIONAL))
        return removed, moved

    def apply(self, logits: Tensor, at: list[int], is_argmax_invariant: bool) -> Tensor:
        """logits [K, V] of a step's rows -> the same, through the objects of one kind.

        at: the row of the step's logits of each row of the objects' logits.
        """
        chosen = [p for p in self.objects if p.is_argmax_invariant() == is_argmax_invariant]
        if not chosen:
            return logits
        places = torch.tensor(at, device=logits.device)
        seen = logits[places]
        for processor in chosen:
            seen = processor.apply(seen)
            if not isinstance(seen, Tensor) or seen.shape != logits.shape:
                raise TypeError(
                    f"logits_processors: {type(processor).__name__}.apply must return a tensor "
                    f"of shape {tuple(logits.shape)}"
                )
        logits[places] = seen.to(logits.dtype)
        return logits


@dataclass
class StepOfObjects:
    """One step: the objects, its members, and which member each of their rows is."""

    user: UserObjects
    members: list[Member]
    at: list[int] = field(default_factory=list)


@dataclass
class EngineProcessorsPart(Part[Array]):
    step: HostOnly[StepOfObjects]

    def changes_draws(self) -> bool:
        """Whether some object applies after the temperature."""
        step = self.step.value
        return step is not None and any(p.is_argmax_invariant() for p in step.user.objects)


class EngineProcessors(LogitsProcessor):
    name = "engine_processors"

    def prepare(self, params: SamplingParams, facts: ModelFacts) -> UserObjects | None:
        user = facts.logits_processors
        if user is None:
            if params.extra_args:
                raise ValidationError(
                    "extra_args must be None or empty, because only classes in "
                    f"LLM(logits_processors=[...]) read them; got {params.extra_args!r}.",
                    parameter="extra_args",
                    value=params.extra_args,
                )
            return None
        assert isinstance(user, UserObjects)
        for processor in user.objects:
            validate = getattr(processor, "validate_params", None)
            if validate is not None:
                validate(params)
        return user

    def needs_previous_token(self, prepared: object) -> bool:
        return True

    def part(
        self, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, users: np.ndarray
    ) -> EngineProcessorsPart[np.ndarray]:
        members = []
        for i in users.tolist():
            row = int(rows[i])
            seq = table.seqs[row]
            tokens = table.token_ids[row, : lengths[i]]
            members.append(Member(seq.seq_id, seq.params, seq.prompt_len, tokens))
        user = table.seqs[int(rows[users[0]])].prepared[self.name]
        assert isinstance(user, UserObjects)
        return EngineProcessorsPart(HostOnly(StepOfObjects(user, members)))

    def apply(
        self, logits: Tensor, part: EngineProcessorsPart[Tensor], rows: Tensor, last_tokens: Tensor
    ) -> Tensor:
        """Applies the objects that may change the largest logit."""
        step = part.step.value
        if step is None:
            return logits
        step.at = step.user.follow(step.members)
        return step.user.apply(logits, step.at, is_argmax_invariant=False)

    def apply_to_draws(self, scaled: Tensor, part: EngineProcessorsPart[Tensor]) -> Tensor:
        """Applies the others to the logits [K, V] after the temperature."""
        step = part.step.value
        if step is None:
            return scaled
        return step.user.apply(scaled, step.at, is_argmax_invariant=True)


def make_objects(
    given: Sequence[object], vllm_config: SimpleNamespace, device: torch.device
) -> UserObjects:
    """The objects of the classes, each given as a class or as a name "module:Class".

    Raises TypeError or ValueError for anything else.
    """
    classes = [find_class(item) for item in given]
    is_pin_memory = device.type == "cuda"
    return UserObjects([cls(vllm_config, device, is_pin_memory) for cls in classes])


def find_class(given: object) -> type[interface.LogitsProcessor]:
    found = given
    if isinstance(given, str):
        module, _, name = given.partition(":")
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as err:
            raise ValueError(
                f"logits_processors={given!r} cannot be imported ({err}); accepted are classes "
                "and names like 'module:Class'"
            ) from err
    missing = [method for method in METHODS if not callable(getattr(found, method, None))]
    if not isinstance(found, type) or missing:
        raise TypeError(
            f"logits_processors={given!r} must be a class with the methods {', '.join(METHODS)}, "
            "or the name 'module:Class' of one (functions belong to "
            "SamplingParams(logits_processors=[...]))"
        )
    return found
