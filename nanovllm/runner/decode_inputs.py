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
from nanovllm.sampling.filters import FILTERS_OFF, FiltersPart

COUNTERS = ("positions", "context_lens", "slot_mapping")
# `step` is what a step adds to the counters.
TOKENS = ("token_ids", "token_rows")
SAMPLING = ("temperature", "uniform", *FILTERS_OFF)
COLUMNS = (*COUNTERS, "step", *TOKENS, *SAMPLING)
FLOATS = ("temperature", "uniform", "top_p", "min_p")
ROW_OF = {name: row for row, name in enumerate(COLUMNS)}


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
        self.padding: dict[str, float] = dict.fromkeys(COLUMNS, 0)
        self.padding.update(context_lens=1, slot_mapping=-1, token_rows=max_num_seqs)
        self.padding.update(FILTERS_OFF)
        self.padding_rows = padding_rows(self.padding, self.stride)

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
        rows become draws at temperature 0. Of the batch's parts only "filters" have columns.
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
        values = np.concatenate((rows[row, column], tables[sequence, block]))
        cast(np.ndarray, self.flat)[places] = values
        return places, values

    def _rows_of(self, batch: Batch[np.ndarray], count: int, size: int) -> np.ndarray:
        """[COLUMNS, size] int32: the batch's columns, padded."""
        attention = batch.attention
        sample = batch.sample
        columns = {
            "positions": attention.positions,
            "context_lens": attention.context_lens,
            "slot_mapping": attention.slot_mapping,
            "step": np.ones(1, np.int32),
            "token_ids": batch.tokens.ids,
            "token_rows": batch.tokens.rows,
        }
        if len(sample.temperature):
            columns["temperature"] = sample.temperature
            columns["uniform"] = sample.uniform
        rows = self.padding_rows[:, :size].copy()
        for name, column in columns.items():
            rows[ROW_OF[name], :count] = column.view(np.int32)
        filters = batch.parts.get("filters")
        if isinstance(filters, FiltersPart):
            for name in FILTERS_OFF:
                rows[ROW_OF[name], filters.at] = getattr(filters, name).view(np.int32)
        return rows


def padding_rows(padding: dict[str, float], length: int) -> np.ndarray:
    """[COLUMNS, length] int32: the columns of rows without a sequence."""
    rows = np.empty((len(COLUMNS), length), np.int32)
    for name, row in zip(COLUMNS, rows):
        column = row.view(np.float32) if name in FLOATS else row
        column[:] = padding[name]
    return rows
