"""Rows of embeddings gathered by a token map.

Rows that follow each other in both places are read at once. A row made of one other is taken over as it is; what is a
mean is summed in the order of the inputs, so the result depends on neither threads nor blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mergekit.dtypes import F32
from mergekit.execute.adapted import Once
from mergekit.execute.inputs import Inputs, read_floats
from mergekit.planning.expression import Rows, RowTable, row_size

__all__ = ["RowsReader"]

_RUN = 1 << 18
"""Elements that are read at once where all rows have to be seen first."""


class RowsReader:
    """Embeddings in the order of another vocabulary."""

    dtype, offset = F32, -1

    def __init__(self, inputs: Inputs, leaf: Rows) -> None:
        self._readers = [inputs.reader(part) for part in leaf.inputs]
        self._numbers, self._columns = leaf.table.numbers, row_size(leaf)
        self._mean = Once(self._measure)

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        out = row[: count * 4].view(np.float32)
        first, stop = start // self._columns, -(-(start + count) // self._columns)
        if (first * self._columns, (stop - first) * self._columns) == (start, count):
            self._gather(first, stop, out.reshape(-1, self._columns))
            return
        rows = np.empty((stop - first, self._columns), np.float32)
        self._gather(first, stop, rows)
        begin = start - first * self._columns
        out[:] = rows.reshape(-1)[begin : begin + count]

    def _gather(self, first: int, stop: int, out: np.ndarray, *, means: bool = True) -> None:
        """Rows ``first .. stop`` into ``out``, float32 [rows, columns]; without ``means``, those are left undone."""
        numbers = self._numbers[:, first:stop]
        counts = (numbers >= 0).sum(axis=0)
        out[counts != 1] = 0.0
        for reader, places in zip(self._readers, numbers, strict=True):
            for at, source, length in _runs(np.flatnonzero((places >= 0) & (counts == 1)), places):
                read_floats(reader, source * self._columns, length * self._columns, out[at : at + length].reshape(-1))
            for at, source, length in _runs(np.flatnonzero((places >= 0) & (counts > 1)), places):
                part = np.empty((length, self._columns), np.float32)
                read_floats(reader, source * self._columns, part.size, part.reshape(-1))
                out[at : at + length] += part
        shared = np.flatnonzero(counts > 1)
        if len(shared):
            out[shared] /= counts[shared, None].astype(np.float32)
        if means:
            absent = np.flatnonzero((numbers == RowTable.MEAN).any(axis=0))
            if len(absent):
                out[absent] = self._mean()

    def _measure(self) -> np.ndarray:
        """The mean of the rows that are not means themselves, float32 [columns]."""
        present = ~(self._numbers == RowTable.MEAN).any(axis=0)
        total = np.zeros(self._columns, np.float64)
        step = max(1, _RUN // max(self._columns, 1))
        for first in range(0, len(present), step):
            stop = min(first + step, len(present))
            rows = np.empty((stop - first, self._columns), np.float32)
            self._gather(first, stop, rows, means=False)
            total += rows[present[first:stop]].sum(axis=0, dtype=np.float64)
        return (total / max(int(present.sum()), 1)).astype(np.float32)


def _runs(rows: np.ndarray, places: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """``rows`` as runs (first row, its source, length) in which sources follow each other as rows do."""
    if not len(rows):
        return
    sources = places[rows]
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(sources) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(rows)])))
    yield from zip(rows[starts].tolist(), sources[starts].tolist(), lengths.tolist(), strict=True)
