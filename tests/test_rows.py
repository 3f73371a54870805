"""Rows gathered by a token map: any part of the result, from any tables, is what the table says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit.checkpoint import TensorInfo
from mergekit.dtypes import F32
from mergekit.execute.rows import RowsReader
from mergekit.planning.expression import Read, Rows, RowTable


class Reader:
    """Elements of an array."""

    dtype, offset = F32, -1

    def __init__(self, values: np.ndarray) -> None:
        self.values = np.ascontiguousarray(values, np.float32).reshape(-1)

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        row[: 4 * count] = self.values[start : start + count].view(np.uint8)


def gathered(matrices: list[np.ndarray], table: np.ndarray) -> np.ndarray:
    """Row by row, as the docstring of ``RowTable`` says."""
    rows = np.zeros((table.shape[1], *matrices[0].shape[1:]))
    means = [r for r in range(len(rows)) if RowTable.MEAN in table[:, r]]
    for r in range(len(rows)):
        parts = [matrix[number] for matrix, number in zip(matrices, table[:, r], strict=True) if number >= 0]
        if r not in means and parts:
            rows[r] = np.mean(parts, axis=0)
    others = [r for r in range(len(rows)) if r not in means]
    for r in means:
        rows[r] = rows[others].mean(axis=0) if others else 0
    return rows


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_part_of_any_table(data):
    count, columns = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 7]))
    seed = data.draw(st.integers(0, 1000))
    random = np.random.default_rng(seed)
    matrices = [random.standard_normal((int(random.integers(1, 12)), columns)) for _ in range(count)]
    rows = data.draw(st.integers(1, 20))
    table = np.stack([random.integers(-1, len(m), rows) for m in matrices])
    if data.draw(st.booleans()):
        table[:, random.random(rows) < 0.3] = -1
        table[0, random.random(rows) < 0.2] = RowTable.MEAN
    if data.draw(st.booleans()):
        run = min(rows, len(matrices[0]))
        table[0, :run] = np.arange(run)
    reads = [Read(i, TensorInfo("t", F32, m.shape, "f", 0, m.size * 4)) for i, m in enumerate(matrices)]
    inputs = SimpleNamespace(reader=lambda leaf: Reader(matrices[leaf.source]))
    reader = RowsReader(inputs, Rows(tuple(reads), RowTable.of(table)))  # type: ignore[arg-type]
    want = gathered([m.astype(np.float32) for m in matrices], table).reshape(-1)
    start = data.draw(st.integers(0, want.size - 1))
    length = data.draw(st.integers(1, want.size - start))
    got = np.empty(length, np.float32)
    reader.read(start, length, got.view(np.uint8))
    np.testing.assert_allclose(got, want[start : start + length], rtol=1e-5, atol=1e-6)


def test_what_is_taken_over_keeps_its_bits():
    odd = np.array([[-0.0, np.inf], [np.nan, 1e-45]], np.float32)
    inputs = SimpleNamespace(reader=lambda leaf: Reader(odd))
    read = Read(0, TensorInfo("t", F32, (2, 2), "f", 0, 16))
    reader = RowsReader(inputs, Rows((read,), RowTable.of(np.array([[1, 0, -1]]))))  # type: ignore[arg-type]
    got = np.empty(6, np.float32)
    reader.read(0, 6, got.view(np.uint8))
    assert got.tobytes() == np.concatenate([odd[::-1].reshape(-1), np.zeros(2, np.float32)]).tobytes()
