"""Sequences: `Sequence` is one prompt and its answer, `SequenceTable` the running
sequences.

The table has one row a sequence and one numpy column a quantity, because a step over
hundreds of sequences is then a few vector operations instead of a Python loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from nanovllm.core.adapter import Adapter
from nanovllm.core.batch import ceil_div
from nanovllm.sampling_params import SamplingParams

PENDING = -1  # stands in token_ids for a token that the device has yet to sample


@dataclass(eq=False, slots=True)
class Prefix:
    """The contents of one full block, and through `parent` of all blocks before it.

    The hash covers every token from the start of the sequence, because it is seeded with
    the parent's hash. Equal hashes are no proof, so a hit also needs equal tokens and the
    same parent.
    """

    hash: int
    tokens: bytes
    parent: Prefix | None
    block_id: int
    hash_seed: int = 0  # where the chain began


@dataclass(eq=False)
class Sequence:
    """One prompt and its answer. A request with n > 1 is n sequences with equal prompts.

    `token_ids` is authoritative while the sequence waits. While it has a row, the row is.
    """

    seq_id: int  # counts up in order of arrival
    params: SamplingParams
    token_ids: np.ndarray  # int32, prompt first
    end: int  # the sequence is finished when it has this many tokens
    request_number: int = 0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # without EOS, which `params.ignore_eos` governs
    streams_tokens: bool = False  # the host needs each token as it comes: for text or logprobs
    needs_previous_token: bool = False  # sampling needs the token before on the host: no overlap
    reads_cache: bool = True  # False: the request needs logits for its whole prompt
    abilities: int = 0  # one bit for each optional ability that the request uses
    prepared: Mapping[str, object] = field(default_factory=dict)  # an ability's name -> its state
    hash_seed: int = 0  # covers what changes K/V or separates caches: adapter, salt
    priority: int = 0  # lower runs first with scheduling_policy="priority"
    adapter: Adapter | None = None

    prompt_len: int = field(init=False)
    row: int = field(default=-1, init=False)  # in the SequenceTable while the sequence runs
    prefix: Prefix | None = field(default=None, init=False)  # of its last registered block
    num_cached_tokens: int = field(default=-1, init=False)  # prefix hit at first admission
    finish_reason: str | None = field(default=None, init=False)
    stop_reason: int | str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.token_ids)


class SequenceTable:
    """Columns of the running sequences. `seqs[row]` is the sequence that has the row."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        columns: Mapping[str, type] | None = None,
    ) -> None:
        def column(dtype: type) -> np.ndarray:
            return np.zeros(max_num_seqs, dtype)

        self.seqs: dict[int, Sequence] = {}
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.token_ids = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.block_table = np.zeros((max_num_seqs, ceil_div(max_model_len, block_size)), np.int32)
        self.seq_id = np.full(max_num_seqs, -1, np.int64)
        self.num_tokens = column(np.int32)  # known tokens, and the pending one if there is one
        self.num_computed = column(np.int32)  # tokens whose K/V is in the cache or scheduled
        self.num_cached = column(np.int32)  # of these, the tokens that the prefix cache had
        self.num_blocks = column(np.int32)
        self.num_registered = column(np.int32)  # blocks that other sequences can hit
        self.end = column(np.int32)
        self.ignore_eos = column(np.bool_)
        self.checks_every_token = column(np.bool_)
        self.needs_previous_token = column(np.bool_)
        self.seed = column(np.uint64)
        self.temperature = column(np.float32)
        self.abilities = column(np.uint32)
        self.columns = {name: column(dtype) for name, dtype in (columns or {}).items()}

    def admit(self, seq: Sequence) -> int:
        """Gives a sequence a row. The scheduler fills in its blocks and what is computed."""
        seq.row = row = self.free_rows.pop()
        length = len(seq.token_ids)
        self.seqs[row] = seq
        self.token_ids[row, :length] = seq.token_ids
        self.seq_id[row] = seq.seq_id
        self.num_tokens[row] = length
        self.num_blocks[row] = 0
        self.end[row] = seq.end
        self.ignore_eos[row] = seq.params.ignore_eos
        self.checks_every_token[row] = seq.streams_tokens or bool(seq.stop_token_ids)
        self.needs_previous_token[row] = seq.needs_previous_token
        self.seed[row] = seq.seed
        self.temperature[row] = seq.params.temperature
        self.abilities[row] = seq.abilities
        for state in seq.prepared.values():
            if isinstance(state, Columns):
                for name, value in state.items():
                    self.columns[name][row] = value
        return row

    def remove(self, seq: Sequence) -> None:
        """Takes the row back. The sequence keeps its tokens, a pending one included."""
        row = seq.row
        seq.token_ids = self.token_ids[row, : self.num_tokens[row]].copy()
        del self.seqs[row]
        self.seq_id[row] = -1
        seq.row = -1
        self.free_rows.append(row)

    def blocks_of(self, row: int) -> list[int]:
        return self.block_table[row, : self.num_blocks[row]].tolist()


class Columns(dict[str, float]):
    """What an ability keeps in columns of the table: name -> the sequence's value."""


@dataclass
class Failure:
    """An error in one sequence's own part of a step. It ends that sequence's request only."""

    seq: Sequence
    error: Exception
