"""A step's plan -> the packed arrays that the device reads. Numpy only.

Nothing here loops over sequences or tokens. Optional abilities add their own parts to the
batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanovllm.core.ability import Ability, SamplingAbility, StepAbility
from nanovllm.core.batch import AttentionMetadata, Batch, Part, SampleRows, Tokens, ceil_div
from nanovllm.core.sequence import Failure, SequenceTable
from nanovllm.core.step import Step

NO_FLOATS = np.empty(0, np.float32)


def build_batch(
    table: SequenceTable, step: Step, block_size: int, abilities: Sequence[Ability] = ()
) -> tuple[Batch[np.ndarray], list[Failure]]:
    """The step's batch, and the sequences whose own parts could not be made.

    Bit i of `table.abilities` stands for `abilities[i]`. A sequence that fails stays in
    the batch without its part, because other sequences may share the pages that it fills.
    """
    rows, starts, ends = step.rows, step.starts, step.ends
    counts = ends - starts
    max_query_len = int(counts.max())
    if max_query_len == 1:
        query_start = np.arange(len(rows) + 1, dtype=np.int32)
        token_rows = rows
        positions = starts
    else:
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        token_rows = np.repeat(rows, counts)
        offsets = np.repeat(query_start[:-1] - starts, counts)
        positions = np.arange(query_start[-1], dtype=np.int32) - offsets
    pages = positions // block_size
    blocks = table.block_table[token_rows, pages]
    slots = (blocks - pages) * block_size + positions
    is_cached = positions < table.num_cached[token_rows]
    max_context_len = int(ends.max())
    batch = Batch(
        tokens=Tokens(ids=table.token_ids[token_rows, positions], rows=token_rows.astype(np.int32)),
        attention=AttentionMetadata(
            positions=positions,
            slot_mapping=np.where(is_cached, -1, slots).astype(np.int32, copy=False),
            query_start=query_start,
            context_lens=ends,
            block_tables=table.block_table[rows, : ceil_div(max_context_len, block_size)],
            max_query_len=max_query_len,
            num_prefills=int(np.count_nonzero(counts > 1)),
            max_context_len=max_context_len,
        ),
        sample=sample_rows(table, step, query_start),
    )
    failures: list[Failure] = []
    used = int(np.bitwise_or.reduce(table.abilities[rows]))
    if used:
        add_parts(batch, table, step, abilities, used, failures)
    return batch, failures


def sample_rows(
    table: SequenceTable, step: Step, query_start: np.ndarray
) -> SampleRows[np.ndarray]:
    rows = step.rows[step.sampled]
    temperature = table.temperature[rows]
    is_greedy = not temperature.any()
    return SampleRows(
        at=query_start[1:][step.sampled] - 1,
        rows=rows.astype(np.int32),
        temperature=NO_FLOATS if is_greedy else temperature,
        uniform=NO_FLOATS if is_greedy else uniform(table.seed[rows], step.ends[step.sampled]),
    )


def add_parts(
    batch: Batch[np.ndarray],
    table: SequenceTable,
    step: Step,
    abilities: Sequence[Ability],
    used: int,
    failures: list[Failure],
) -> None:
    """Adds the parts of the abilities whose bits are in `used`."""
    rows = step.rows[step.sampled]
    lengths = step.ends[step.sampled]
    for bit, ability in enumerate(abilities):
        if not used >> bit & 1:
            continue
        part: Part[np.ndarray] | None
        if isinstance(ability, StepAbility):
            users = np.flatnonzero(table.abilities[step.rows] >> bit & 1)
            part = ability.part(table, step, batch.attention.query_start, users)
        else:
            assert isinstance(ability, SamplingAbility)
            users = np.flatnonzero(table.abilities[rows] >> bit & 1)
            part = sampling_part(ability, table, rows, lengths, users, failures)
        if part is not None:
            batch.parts[ability.name] = part


def sampling_part(
    ability: SamplingAbility,
    table: SequenceTable,
    rows: np.ndarray,
    lengths: np.ndarray,
    users: np.ndarray,
    failures: list[Failure],
) -> Part[np.ndarray] | None:
    """The ability's part, without the sequences for which it raises an error."""
    if not len(users):
        return None
    try:
        return ability.part(table, rows, lengths, users)
    except Exception:
        sound = []
        for user in users:
            try:
                ability.part(table, rows, lengths, np.array([user]))
                sound.append(user)
            except Exception as error:
                failures.append(Failure(table.seqs[int(rows[user])], error))
        return ability.part(table, rows, lengths, np.array(sound)) if sound else None


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float32 in [0, 1), a function of seed (uint64) and position.

    It is splitmix64 (Steele et al., 2014).
    """
    x = seeds + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    x >>= np.uint64(40)
    return x.astype(np.float32) * np.float32(2**-24)
