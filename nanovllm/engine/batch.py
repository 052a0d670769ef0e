"""The step as the device sees it: packed numpy arrays, no Sequence and no torch.

All arrays hold 4-byte items, so a batch travels as one int32 buffer: one copy to a GPU, one message to other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.engine.edits import add_edits
from nanovllm.engine.sequence import SequenceTable

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Step

Array = Any  # of numpy on the host, of torch on the device


def no_ints() -> Any:
    return field(default_factory=lambda: np.empty(0, np.int32))


def no_floats() -> Any:
    return field(default_factory=lambda: np.empty(0, np.float32))


@dataclass
class Batch:
    """T tokens of S sequences, K of which get a new token. Fields that no request of the batch needs are empty.

    Token ids of -1 are pending: the device has sampled them for `token_rows` in an earlier step that the host has not
    seen yet. What `*_at` arrays hold are indices: into the T tokens, or into the K sampled rows (samples), as said.
    """

    sizes: Array  # [5] those of AttentionMetadata, in its order; most logprobs and most prompt logprobs wanted
    token_ids: Array  # [T]
    positions: Array  # [T]
    slot_mapping: Array  # [T] where K/V go: block * block_size + offset, or -1
    token_rows: Array  # [T]
    query_start: Array  # [S + 1]
    context_lens: Array  # [S]
    block_tables: Array  # [S, most blocks]
    sample_at: Array  # [K] into tokens: whose logits are sampled
    sample_rows: Array  # [K]
    temperature: Array = no_floats()  # [K] 0: greedy; empty where all are
    uniform: Array = no_floats()  # [K] in [0, 1)
    filter_at: Array = no_ints()  # [F] into samples, those that are not greedy
    top_k: Array = no_ints()  # [F] the vocabulary size where off
    top_p: Array = no_floats()  # [F]
    min_p: Array = no_floats()  # [F]
    allow_at: Array = no_ints()  # [A] into samples: only the ids of allow_ids[allow_start[i]:allow_start[i + 1]]
    allow_start: Array = no_ints()  # [A + 1]
    allow_ids: Array = no_ints()
    bias_at: Array = no_ints()  # [E] into samples
    bias_ids: Array = no_ints()  # [E]
    bias_values: Array = no_floats()  # [E] added to the logits; -inf bans
    penalty_at: Array = no_ints()  # [P] into samples
    presence: Array = no_floats()  # [P]
    frequency: Array = no_floats()  # [P]
    repetition: Array = no_floats()  # [P]
    history_start: Array = no_ints()  # [P + 1]
    history_prompt: Array = no_ints()  # [P] how many tokens of each history are prompt
    history: Array = no_ints()  # token ids, pending ones -1
    logprob_at: Array = no_ints()  # [L] into samples
    prompt_at: Array = no_ints()  # [Q] into tokens
    prompt_targets: Array = no_ints()  # [Q] the prompt token that follows each

    def pack(self) -> tuple[np.ndarray, list[int]]:
        """All fields in one int32 buffer, and the length of each."""
        arrays = [getattr(self, f.name) for f in fields(self)]
        lengths, at = [array.size for array in arrays], 0
        buffer = np.empty(sum(map(room, lengths)), np.int32)
        for array, length in zip(arrays, lengths):
            if length:
                buffer[at : at + length] = array.reshape(-1).view(np.int32)
                at += room(length)
        return buffer, lengths

    @classmethod
    def unpack(cls, lengths: list[int], buffer: Any, float32: Any) -> Batch:
        """Views into a packed buffer, of numpy or of torch; `float32` is that library's dtype."""
        arrays, at = {}, 0
        for f, length in zip(fields(cls), lengths):
            piece = buffer[at : at + length]
            arrays[f.name] = piece.view(float32) if f.name in FLOAT_FIELDS else piece
            at += room(length)
        num_seqs = len(arrays["context_lens"])
        arrays["block_tables"] = arrays["block_tables"].reshape(num_seqs, -1)
        return cls(**arrays)


def room(length: int) -> int:
    """What so many items take: each array begins at a multiple of 16 bytes, or Triton compiles its kernels anew."""
    return -(-length // 4) * 4


FLOAT_FIELDS = {"temperature", "uniform", "top_p", "min_p", "bias_values", "presence", "frequency", "repetition"}


Failures = list[tuple[int, Exception]]  # (row of the table, what was raised for it)


def build_batch(table: SequenceTable, step: Step, block_size: int, vocab_size: int) -> tuple[Batch, Failures]:
    """Reads the step's rows out of the table.

    A row whose own edits raise takes part in the step without them, as others may read the pages that it fills; its
    failure is for the caller to act on.
    """
    rows, starts, ends = step.rows, step.starts, step.ends
    counts = ends - starts
    query_start = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    if query_start[-1] == len(rows):  # one token each
        token_rows, positions = rows, starts
    else:
        token_rows = np.repeat(rows, counts)
        positions = np.arange(query_start[-1], dtype=np.int32) - np.repeat(query_start[:-1] - starts, counts)
    blocks = table.block_table[token_rows, positions // block_size]
    slots = np.where(positions < table.num_cached[token_rows], -1, blocks * block_size + positions % block_size)
    sample_rows = rows[step.sampled]
    max_blocks = -(-int(ends.max()) // block_size)
    batch = Batch(
        sizes=np.array([counts.max(), np.count_nonzero(counts > 1), ends.max(), -1, -1], np.int32),
        token_ids=table.token_ids[token_rows, positions],
        positions=positions,
        slot_mapping=slots.astype(np.int32, copy=False),
        token_rows=token_rows.astype(np.int32),
        query_start=query_start,
        context_lens=ends,
        block_tables=table.block_table[rows, :max_blocks],
        sample_at=query_start[1:][step.sampled] - 1,
        sample_rows=sample_rows.astype(np.int32),
    )
    return batch, add_sampling(batch, table, sample_rows, ends[step.sampled], vocab_size)


def add_sampling(
    batch: Batch, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, vocab_size: int
) -> Failures:
    """Fills in what the sampler needs for `rows`, whose next token is number `lengths` of its sequence.

    Only what some row uses: an all-greedy batch adds nothing. Returns the rows whose edits raised.
    """
    temperature = table.temperature[rows]
    if temperature.any():
        batch.temperature, batch.uniform = temperature, uniform(table.seed[rows], lengths)
        batch.filter_at = np.flatnonzero(table.filters[rows]).astype(np.int32)
        filtered = rows[batch.filter_at]
        batch.top_k = np.where(table.top_k[filtered] > 0, table.top_k[filtered], vocab_size).astype(np.int32)
        batch.top_p, batch.min_p = table.top_p[filtered], table.min_p[filtered]
    batch.logprob_at = np.flatnonzero(table.num_logprobs[rows] >= 0).astype(np.int32)
    batch.sizes[3] = table.num_logprobs[rows].max(initial=-1)
    edited = np.flatnonzero(table.edits[rows])
    if not len(edited):
        return []
    try:
        add_edits(batch, table, rows, lengths, edited)
    except Exception:
        return add_sound_edits(batch, table, rows, lengths, edited)
    return []


def add_sound_edits(
    batch: Batch, table: SequenceTable, rows: np.ndarray, lengths: np.ndarray, edited: np.ndarray
) -> Failures:
    """`add_edits` of the rows that do not raise; returns the others."""
    failures: Failures = []
    sound = []
    for i in edited:
        try:
            add_edits(replace(batch), table, rows, lengths, np.array([i]))
            sound.append(i)
        except Exception as err:
            failures.append((int(rows[i]), err))
    if sound:
        add_edits(batch, table, rows, lengths, np.array(sound))
    return failures


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float32 in [0, 1) that depends on seed (uint64) and position alone: splitmix64 (Steele et al., 2014)."""
    x = seeds + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
