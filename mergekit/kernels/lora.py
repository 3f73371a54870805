"""Kernels of adapters: a matrix plus a low-rank product, and the norms that DoRA divides by.

All work on a run of elements of a matrix stored by rows: ``values`` float32 [count] are its elements ``first ..``,
its rows have ``columns`` elements. What an element becomes depends on its place only, not on the run it came in.
"""

from __future__ import annotations

import numpy as np

from mergekit.kernels.jit import kernel

_TILE = 512
"""Columns whose sums are kept in the first-level cache."""


@kernel
def add_product(
    values: np.ndarray, first: int, columns: int, left: np.ndarray, right: np.ndarray, scale: np.float32
) -> None:
    """values += scale * (left @ right), with ``left`` float32 [rows, rank] and ``right`` float32 [rank, columns].

    Each sum runs over the rank in ascending order, in float32.
    """
    total = np.empty(_TILE, np.float32)
    rank = right.shape[0]
    done = 0
    while done < len(values):
        row, column = (first + done) // columns, (first + done) % columns
        size = min(_TILE, columns - column, len(values) - done)
        total[:size] = 0
        r = 0
        while r + 4 <= rank:  # four at a time: same order of additions, a quarter of the loads and stores
            b0, b1, b2, b3 = left[row, r], left[row, r + 1], left[row, r + 2], left[row, r + 3]
            a0, a1 = right[r, column : column + size], right[r + 1, column : column + size]
            a2, a3 = right[r + 2, column : column + size], right[r + 3, column : column + size]
            for i in range(size):
                total[i] = (((total[i] + b0 * a0[i]) + b1 * a1[i]) + b2 * a2[i]) + b3 * a3[i]
            r += 4
        while r < rank:
            b0 = left[row, r]
            a0 = right[r, column : column + size]
            for i in range(size):
                total[i] += b0 * a0[i]
            r += 1
        out = values[done : done + size]
        for i in range(size):
            out[i] += scale * total[i]
        done += size


@kernel
def multiply(values: np.ndarray, first: int, columns: int, by_row: bool, factors: np.ndarray) -> None:
    """values *= the factor of their row, or of their column; ``factors`` float32 [rows] or [columns]."""
    done = 0
    while done < len(values):
        row, column = (first + done) // columns, (first + done) % columns
        size = min(columns - column, len(values) - done)
        out = values[done : done + size]
        if by_row:
            factor = factors[row]
            for i in range(size):
                out[i] *= factor
        else:
            part = factors[column : column + size]
            for i in range(size):
                out[i] *= part[i]
        done += size


@kernel
def add_squares(values: np.ndarray, first: int, columns: int, by_row: bool, totals: np.ndarray) -> None:
    """Add the squares of ``values`` to the total of their row or column; ``totals`` float64 [rows] or [columns].

    One element after the other, so runs have to come in order.
    """
    done = 0
    while done < len(values):
        row, column = (first + done) // columns, (first + done) % columns
        size = min(columns - column, len(values) - done)
        part = values[done : done + size]
        if by_row:
            total = totals[row]
            for i in range(size):
                total += np.float64(part[i]) * np.float64(part[i])
            totals[row] = total
        else:
            out = totals[column : column + size]
            for i in range(size):
                out[i] += np.float64(part[i]) * np.float64(part[i])
        done += size
