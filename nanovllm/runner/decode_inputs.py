"""The inputs of decode graphs. They stay on the device.

A decode step adds one to positions, context lengths and slots on the device (`advance`).
The host does the same to its copy and compares the copy with the next batch. Only the
differences travel: table entries and first slots of new blocks, random numbers, rows of
new sequences. Nothing here knows why a row changed, so no change can be missed.
"""

from __future__ import annotations

from typing import Generic, cast

import numpy as np

from nanovllm.core.batch import Batch, Buffer, padded_length
from nanovllm.core.step import Array

COUNTERS = ("positions", "context_lens", "slot_mapping")
# `step` is what a step adds to the counters.
COLUMNS = (*COUNTERS, "step", "token_ids", "token_rows", "temperature", "uniform")
FLOATS = ("temperature", "uniform")


class DecodeInputs(Generic[Array]):
    """One int32 array of numpy or torch: a row for each column, then the block tables.

    columns: name -> [max_num_seqs], views. tables: [max_num_seqs, max_blocks], a view.
    Rows without a sequence read one token of page 0 and write nowhere.
    """

    def __init__(self, flat: Array, max_num_seqs: int, max_blocks: int, float32: object) -> None:
        self.flat = flat
        self.stride = padded_length(max_num_seqs)
        self.max_blocks = max_blocks
        self.tables_start = len(COLUMNS) * self.stride
        whole = cast(Buffer, flat)
        rows = whole[: self.tables_start]
        tables = whole[self.tables_start :]
        self.rows = rows.reshape(len(COLUMNS), self.stride)
        self.tables = tables.reshape(max_num_seqs, max_blocks)
        self.columns: dict[str, Buffer] = {}
        for name, row in zip(COLUMNS, self.rows):
            column = row[:max_num_seqs]
            if name in FLOATS:
                column = column.view(float32)
            self.columns[name] = column
        self.padding = dict.fromkeys(COLUMNS, 0)
        self.padding.update(context_lens=1, slot_mapping=-1, token_rows=max_num_seqs)

    @staticmethod
    def size(max_num_seqs: int, max_blocks: int) -> int:
        """The length of `flat`."""
        rows = len(COLUMNS) * padded_length(max_num_seqs)
        tables = max_num_seqs * max_blocks
        return rows + tables

    def clear(self) -> None:
        """Makes all rows padding."""
        cast(Buffer, self.flat)[:] = 0
        for name, padding in self.padding.items():
            self.columns[name][:] = padding

    def advance(self, size: int) -> None:
        """Counts one step in the first `size` rows."""
        counters = self.rows[: len(COUNTERS), :size]
        counters += self.rows[len(COUNTERS), :size]

    def update(self, batch: Batch[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
        """Puts a decode batch into the first `size` rows of the host's copy.

        Returns the changed places in `flat` [n] and their new contents [n] int32. Greedy
        rows become draws at temperature 0. The batch's parts are left out.
        """
        tables = batch.attention.block_tables
        count, width = tables.shape
        rows = self._rows_of(batch, count, size)
        old_rows = cast(np.ndarray, self.rows[:, :size])
        old_tables = cast(np.ndarray, self.tables[:count, :width])
        changed_rows = np.flatnonzero(rows != old_rows)
        changed_tables = np.flatnonzero(tables != old_tables)
        row, column = np.divmod(changed_rows, size)
        sequence, block = np.divmod(changed_tables, width)
        in_rows = row * self.stride + column
        in_tables = self.tables_start + sequence * self.max_blocks + block
        places = np.concatenate((in_rows, in_tables))
        old_rows[:] = rows
        old_tables[:] = tables
        flat = cast(np.ndarray, self.flat)
        return places, flat[places]

    def _rows_of(self, batch: Batch[np.ndarray], count: int, size: int) -> np.ndarray:
        """[COLUMNS, size]: the batch's columns, padded."""
        attention = batch.attention
        columns = {
            "positions": attention.positions,
            "context_lens": attention.context_lens,
            "slot_mapping": attention.slot_mapping,
            "token_ids": batch.tokens.ids,
            "token_rows": batch.tokens.rows,
        }
        sample = batch.sample
        if len(sample.temperature):
            columns["temperature"] = sample.temperature
            columns["uniform"] = sample.uniform
        rows = np.empty((len(COLUMNS), size), np.int32)
        for name, row in zip(COLUMNS, rows):
            row[count:] = self.padding[name]
            if name == "step":
                row[:count] = 1
            elif name in FLOATS:
                row.view(np.float32)[:count] = columns.get(name, 0)
            else:
                row[:count] = columns[name]
        return rows
