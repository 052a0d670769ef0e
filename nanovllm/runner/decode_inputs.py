"""What decode graphs read: it stays on the device from step to step, and the host sends only what it does not foresee.

A decode step adds one to positions, context lengths and slots where they are (`advance`), and the host does the same to its
copy. What then differs from the next batch travels: the table entries and first slots of new blocks, random numbers, rows
that changed hands. Nothing here knows why a row changed, so nothing can be forgotten.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nanovllm.engine.batch import Array, Batch, room

COUNTERS = ("positions", "context_lens", "slot_mapping")
COLUMNS = (*COUNTERS, "step", "token_ids", "token_rows", "temperature", "uniform")  # `step` is added to the counters


class DecodeInputs:
    """One int32 array, of numpy or of torch: `pitch` entries for each of COLUMNS, then the block tables.

    columns: name -> [max_num_seqs], views; tables: [max_num_seqs, max_blocks], a view. Rows without a sequence read one
    token of page 0 and write nowhere.
    """

    def __init__(self, flat: Array, max_num_seqs: int, max_blocks: int, float32: Any) -> None:
        pitch = room(max_num_seqs)
        self.flat, self.pitch, self.max_blocks, self.start = flat, pitch, max_blocks, len(COLUMNS) * pitch
        self.rows = flat[: self.start].reshape(len(COLUMNS), pitch)
        self.columns = {name: row[:max_num_seqs] for name, row in zip(COLUMNS, self.rows)}
        for name in ("temperature", "uniform"):
            self.columns[name] = self.columns[name].view(float32)
        self.tables = flat[self.start :].reshape(max_num_seqs, max_blocks)
        self.padding = dict.fromkeys(COLUMNS, 0) | {"context_lens": 1, "slot_mapping": -1, "token_rows": max_num_seqs}

    @staticmethod
    def size(max_num_seqs: int, max_blocks: int) -> int:
        return len(COLUMNS) * room(max_num_seqs) + max_num_seqs * max_blocks

    def clear(self) -> None:
        """Leaves no sequence."""
        self.flat[:] = 0
        for name, padding in self.padding.items():
            self.columns[name][:] = padding

    def advance(self, size: int) -> None:
        """What a step does to its first `size` rows."""
        self.rows[: len(COUNTERS), :size] += self.rows[len(COUNTERS), :size]

    def update(self, batch: Batch, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Puts a decode batch into the first `size` rows of the host's copy.

        Returns the places in `flat` [n] where that changed something, and what is there now [n] int32. Greedy rows become
        draws at temperature 0; filters, edits and logprobs are left out.
        """
        count, width = batch.block_tables.shape
        rows = np.empty((len(COLUMNS), size), np.int32)
        for row, (name, padding) in zip(rows, self.padding.items()):
            row[count:] = padding
            if name in ("temperature", "uniform"):
                row.view(np.float32)[:count] = getattr(batch, name) if len(batch.temperature) else 0
            else:
                row[:count] = 1 if name == "step" else getattr(batch, name)
        before, tables = self.rows[:, :size], self.tables[:count, :width]
        changed, changed_tables = np.flatnonzero(rows != before), np.flatnonzero(batch.block_tables != tables)
        (row, column), (sequence, block) = np.divmod(changed, size), np.divmod(changed_tables, width)
        places = np.concatenate((row * self.pitch + column, self.start + sequence * self.max_blocks + block))
        before[:], tables[:] = rows, batch.block_tables
        return places, self.flat[places]
