"""Readers of what adapters are baked onto: matrices plus low-rank products, 4-bit quantisation and its undoing.

What belongs to a whole tensor (the adapter's two matrices, DoRA's norms, the scales of 4-bit blocks) is computed once,
by the first thread that asks, in the order of the elements; so the result depends on neither threads nor blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from mergekit.dtypes import F32, DType
from mergekit.execute.inputs import Inputs, read_floats
from mergekit.planning.expression import Bake, Dequantize4, Leaf, Quantize4, Read, Rows, shape_of

__all__ = ["BakeReader", "Dequantize4Reader", "Once", "Quantize4Reader", "held_bytes"]

_RUN = 1 << 18
"""Elements that are read at once where a whole tensor has to be seen first."""

Value = TypeVar("Value")


def held_bytes(leaf: Leaf) -> int:
    """Bytes that the readers of a leaf hold for as long as its tensor is worked on."""
    if isinstance(leaf, Rows):
        return leaf.table.rows * leaf.table.inputs * 4 + sum(held_bytes(part) for part in leaf.inputs)
    held = 0
    while not isinstance(leaf, Read):
        assert not isinstance(leaf, Rows), "rows are gathered last"
        if isinstance(leaf, Bake):
            rows = max(shape_of(leaf)[0], 1)
            # Decoded, and once more while they are rearranged; norms and factors of DoRA.
            held += 8 * (leaf.a.info.size + leaf.b.info.size) + 12 * (rows if leaf.magnitude else 0)
        elif isinstance(leaf, Dequantize4):
            held += 8 * leaf.scales.values.info.size
        elif isinstance(leaf, Quantize4) and leaf.scheme == "nf4-double":
            held += 8 * (_size(leaf) // 64 + 1)
        leaf = leaf.input
    return held


def _size(leaf: Leaf) -> int:
    size = 1
    for length in shape_of(leaf):
        size *= length
    return size


class Once(Generic[Value]):
    """A value that the first thread to ask computes, while others wait."""

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._value: Value | None = None

    def __call__(self) -> Value:
        with self._lock:
            if self._value is None:
                self._value = self._make()
            return self._value


def _whole(inputs: Inputs, read: Read) -> np.ndarray:
    """All of a small tensor, float32."""
    values = np.empty(read.info.size, np.float32)
    read_floats(inputs.reader(read), 0, read.info.size, values)
    return values.reshape(read.info.shape)


def _raw(inputs: Inputs, read: Read) -> np.ndarray:
    """The bytes of a small tensor."""
    raw = np.empty(read.info.nbytes, np.uint8)
    inputs.reader(read).read(0, read.info.size, raw)
    return raw


def _code(dtype: DType) -> int:
    from mergekit.kernels.codec import CODES

    return CODES[dtype]


class BakeReader:
    """A matrix plus its adapter."""

    dtype, offset = F32, -1

    def __init__(self, inputs: Inputs, leaf: Bake) -> None:
        self._inputs, self._leaf = inputs, leaf
        self._input = inputs.reader(leaf.input)
        self._rows, self._columns = shape_of(leaf)
        self._factors_by_row = not leaf.transposed
        self._matrices = Once(self._load)
        self._factors = Once(self._measure)

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        from mergekit.kernels import lora

        out = row[: count * 4].view(np.float32)
        self._add(start, out)
        if self._leaf.magnitude is not None:
            lora.multiply(out, start, self._columns, self._factors_by_row, self._factors())

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        """The product's factors as the matrix is stored: [rows, rank] and [rank, columns]."""
        a, b = _whole(self._inputs, self._leaf.a), _whole(self._inputs, self._leaf.b)
        return (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if self._leaf.transposed else (b, a)

    def _add(self, start: int, out: np.ndarray) -> None:
        """Elements ``start ..`` of W + scale B A."""
        from mergekit.kernels import lora

        read_floats(self._input, start, len(out), out)
        lora.add_product(out, start, self._columns, *self._matrices(), np.float32(self._leaf.scale))

    def _measure(self) -> np.ndarray:
        """What to multiply each output's weights by to give them the length of the magnitude vector, float32 [out]."""
        from mergekit.kernels import lora

        assert self._leaf.magnitude is not None
        magnitude = _whole(self._inputs, self._leaf.magnitude).reshape(-1)
        totals = np.zeros(len(magnitude), np.float64)
        size = self._rows * self._columns
        part = np.empty(min(_RUN, size), np.float32)
        for start in range(0, size, _RUN):
            out = part[: min(_RUN, size - start)]
            self._add(start, out)
            lora.add_squares(out, start, self._columns, self._factors_by_row, totals)
        with np.errstate(divide="ignore", invalid="ignore"):  # a length of zero shows as NaN in the result
            return (magnitude.astype(np.float64) / np.sqrt(totals)).astype(np.float32)


class Quantize4Reader:
    """What 4-bit quantisation leaves of a tensor."""

    dtype, offset = F32, -1

    def __init__(self, inputs: Inputs, leaf: Quantize4) -> None:
        from mergekit.kernels.four_bit import levels

        self._input, self._size = inputs.reader(leaf.input), _size(leaf)
        self._code = _code(leaf.dtype)
        self._table, self._bounds = levels(leaf.scheme.removesuffix("-double"))
        self._is_double = leaf.scheme.endswith("-double")
        self._scales = Once(self._measure)

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        from mergekit.kernels.four_bit import BLOCK, requantize

        out = row[: count * 4].view(np.float32)
        first, stop = start // BLOCK * BLOCK, min(-(-(start + count) // BLOCK) * BLOCK, self._size)
        values = out if (first, stop) == (start, start + count) else np.empty(stop - first, np.float32)
        self._load(first, values)
        scales = np.empty(0, np.float32)
        if self._is_double:
            scales = self._scales()[first // BLOCK : -(-stop // BLOCK)]
        requantize(values, BLOCK, self._table, self._bounds, scales, self._code)
        if values is not out:
            out[:] = values[start - first : start - first + count]

    def _load(self, start: int, out: np.ndarray) -> None:
        """Elements as they are when quantisation meets them: in the type that the model is loaded in."""
        from mergekit.kernels.four_bit import round_to

        read_floats(self._input, start, len(out), out)
        round_to(out, self._code)

    def _measure(self) -> np.ndarray:
        """The scales of all blocks after their own quantisation, float32."""
        from mergekit.kernels.four_bit import BLOCK, double_quantize, largest

        scales = np.empty(-(-self._size // BLOCK), np.float32)
        part = np.empty(min(_RUN, self._size), np.float32)
        for start in range(0, self._size, _RUN):
            out = part[: min(_RUN, self._size - start)]
            self._load(start, out)
            largest(out, BLOCK, scales[start // BLOCK : -(-(start + len(out)) // BLOCK)])
        return double_quantize(scales)


class Dequantize4Reader:
    """A packed 4-bit tensor with its stored tables."""

    dtype, offset = F32, -1

    def __init__(self, inputs: Inputs, leaf: Dequantize4) -> None:
        self._inputs, self._leaf = inputs, leaf
        self._packed, self._code = inputs.reader(leaf.input), _code(leaf.dtype)
        self._tables = Once(self._load)

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        from mergekit.kernels.four_bit import unpack

        first, stop = start // 2, (start + count + 1) // 2
        raw = np.empty(stop - first, np.uint8)
        self._packed.read(first, stop - first, raw)
        table, scales = self._tables()
        unpack(raw, start, self._leaf.scales.block, table, scales, self._code, row[: count * 4].view(np.float32))

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        """The 16 numbers, and the scale of each block; both float32."""
        scales = self._leaf.scales
        table = _whole(self._inputs, self._leaf.table).reshape(-1)
        if scales.table is None or scales.scales is None:
            return table, _whole(self._inputs, scales.values).reshape(-1)
        codes = _raw(self._inputs, scales.values)
        numbers = _whole(self._inputs, scales.table).reshape(-1)[codes]
        outer = np.repeat(_whole(self._inputs, scales.scales).reshape(-1), scales.outer)[: len(codes)]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite shows in the result
            return table, numbers * outer + np.float32(scales.offset)
