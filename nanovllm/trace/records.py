"""The records of a run, as docs/trace.md describes them. Each is one JSON object.

Times are seconds since the trace began, durations are microseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from typing_extensions import NotRequired

VERSION = 1


class RunRecord(TypedDict):
    """The first record: the model and the limits of the engine."""

    kind: Literal["run"]
    version: int
    model: str
    architecture: str
    device: str
    dtype: str
    attention: str
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool
    time: float  # Unix time


class RequestRecord(TypedDict):
    """A request was added."""

    kind: Literal["request"]
    time: float
    request: str
    seqs: list[int]
    prompt: list[int]
    prompt_text: str | None
    prompt_pieces: list[str]
    max_tokens: int
    params: dict[str, object]


class Run(TypedDict):
    """What a step computes of one sequence: tokens `start` to `start + count - 1`."""

    seq: int
    start: int
    count: int
    kind: Literal["prefill", "decode"]
    samples: bool


class Admission(TypedDict):
    """A sequence got a row, and the `hit` blocks with `cached` tokens of its prompt."""

    seq: int
    cached: int
    hit: list[int]


class Finish(TypedDict):
    """A sequence ended."""

    seq: int
    reason: str
    text: NotRequired[str]  # what the end adds to the text of the tokens


class BlockEvent(TypedDict):
    """Something happened to a block on behalf of a sequence."""

    event: Literal["acquire", "allocate", "register", "evict", "release", "free"]
    block: int
    refs: int
    seq: int | None
    hash: str | None
    parent: int | None
    start: int | None


class Token(TypedDict):
    """A sampled token."""

    seq: int
    position: int
    id: int
    text: str
    piece: NotRequired[str]
    logprob: float | None
    top: list[tuple[str, float | None]] | None


class Budget(TypedDict):
    """Tokens of a step."""

    used: int
    max: int


class Durations(TypedDict):
    """Microseconds. None: not measured, because the step raised or was not collected."""

    schedule: int
    build: int | None
    launch: int | None
    collect: int | None
    output: int | None
    device: int | None


class State(TypedDict):
    """The scheduler after a step was scheduled, and what changed since the step before."""

    running: list[int]
    waiting: list[int]
    admitted: list[Admission]
    preempted: list[int]
    finished: list[Finish]
    tables: dict[str, list[int]]
    blocks: list[BlockEvent]
    free: int
    cached: int
    reset: NotRequired[bool]


class StepRecord(State):
    """One step."""

    kind: Literal["step"]
    number: int
    time: float
    seqs: list[Run]
    budget: Budget
    tokens: list[Token]
    us: Durations
    device_time: float | None
    collect_time: float | None


class EndRecord(State):
    """No request is left."""

    kind: Literal["end"]
    time: float
    stats: dict[str, int]
    error: str | None


Record = RunRecord | RequestRecord | StepRecord | EndRecord
