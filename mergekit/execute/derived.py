"""Readers that compute: parts of tensors, fp8 times its scales, rows rearranged, noise added.

Each wraps the reader of its input, so they nest as the nodes of a plan do. What is computed is float32.
"""

from __future__ import annotations

import numpy as np

from mergekit.dtypes import F8_E4M3, F32
from mergekit.execute.adapted import BakeReader, Dequantize4Reader, Quantize4Reader
from mergekit.execute.inputs import Inputs, Reader, read_floats
from mergekit.execute.rows import RowsReader
from mergekit.planning.expression import (
    Bake,
    Dequantize,
    Dequantize4,
    Leaf,
    Noise,
    PermuteScale,
    Quantize4,
    Rows,
    Split,
    row_size,
)

__all__ = ["derived_reader"]


def derived_reader(inputs: Inputs, leaf: Leaf) -> Reader:
    """The reader of a leaf that is no plain tensor."""
    if isinstance(leaf, Rows):
        return RowsReader(inputs, leaf)
    if isinstance(leaf, Split):
        return _SplitReader(inputs.reader(leaf.input), leaf.start * row_size(leaf))
    if isinstance(leaf, Dequantize):
        return _Fp8Reader(inputs, leaf)
    if isinstance(leaf, PermuteScale):
        return _PermuteReader(inputs.reader(leaf.input), leaf)
    if isinstance(leaf, Bake):
        return BakeReader(inputs, leaf)
    if isinstance(leaf, Quantize4):
        return Quantize4Reader(inputs, leaf)
    if isinstance(leaf, Dequantize4):
        return Dequantize4Reader(inputs, leaf)
    assert isinstance(leaf, Noise)
    return _NoiseReader(inputs.reader(leaf.input), leaf)


class _SplitReader:
    """A run of another reader's elements."""

    def __init__(self, reader: Reader, first: int) -> None:
        self.dtype = reader.dtype
        self.offset = reader.offset + first * reader.dtype.size if reader.offset >= 0 else -1
        self._reader, self._first = reader, first

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        self._reader.read(self._first + start, count, row)


class _PermuteReader:
    """Rows in another order, each times a factor."""

    dtype, offset = F32, -1

    def __init__(self, reader: Reader, leaf: PermuteScale) -> None:
        self._reader, self._columns = reader, row_size(leaf)
        self._order, self._factors = leaf.order, np.array(leaf.factors, np.float32)

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        out = row[: count * 4].view(np.float32)
        done = 0
        while done < count:
            target, column = divmod(start + done, self._columns)
            run, slot = divmod(target, len(self._order))
            source = run * len(self._order) + self._order[slot]
            part = out[done : done + min(self._columns - column, count - done)]
            read_floats(self._reader, source * self._columns + column, len(part), part)
            part *= self._factors[slot]
            done += len(part)


class _NoiseReader:
    """Elements plus counter-based normal noise."""

    dtype, offset = F32, -1

    def __init__(self, reader: Reader, leaf: Noise) -> None:
        self._reader, self._leaf = reader, leaf

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        from mergekit.kernels.noise import add_noise

        out = row[: count * 4].view(np.float32)
        read_floats(self._reader, start, count, out)
        add_noise(out, start, *self._leaf.key, self._leaf.scale)


class _Fp8Reader:
    """fp8 numbers times the scale of their block."""

    dtype, offset = F32, -1

    def __init__(self, inputs: Inputs, leaf: Dequantize) -> None:
        from mergekit.kernels import codec

        info, scale = leaf.input.info, leaf.scale.info
        self._raw = inputs.reader(leaf.input)
        rows = info.shape[0] if info.shape else 1
        self._columns = max(info.size // max(rows, 1), 1)
        self._blocks = (leaf.rows, leaf.columns)
        is_e4m3 = info.dtype == F8_E4M3
        self._table = codec.fp8_table(4, 3, has_infinity=False) if is_e4m3 else codec.fp8_table(5, 2, has_infinity=True)
        values = np.empty(scale.size, np.float32)
        read_floats(inputs.reader(leaf.scale), 0, scale.size, values)
        self._scale = values.reshape(-(-rows // leaf.rows), -(-self._columns // leaf.columns))

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        from mergekit.kernels import codec

        raw = np.empty(count, np.uint8)
        self._raw.read(start, count, raw)
        out = row[: count * 4].view(np.float32)
        codec.dequantize_fp8(raw, self._table, self._scale, self._columns, *self._blocks, start, count, out)
