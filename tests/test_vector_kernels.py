"""Kernels for tensors that are many vectors: exact sums, any place to start, any length, each element type."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from kernel_cases import BACK_ENDS, FLOATS, back_end, pack, stored32, unpack
from mergekit.dtypes import BF16, F32
from mergekit.kernels import cpu

SHAPES = [(40, 100), (3, 5000), (5000, 3), (4096, 1), (1, 4096), (2, 3000)]
"""Rows shorter and longer than a block of the kernels, and of one element."""


@pytest.fixture(params=BACK_ENDS)
def kernels(request):
    return back_end(request.param)


def models(shape: tuple[int, int], count: int = 3) -> list[np.ndarray]:
    random = np.random.default_rng([7, *shape])
    base = random.standard_normal(shape[0] * shape[1])
    return [np.float32(base + 0.3 * m * random.standard_normal(len(base))) for m in range(count)]


def grams(kernels, shape: tuple[int, int], inputs: list[np.ndarray], dtypes: list, base: int, cuts: list[int]):
    """Gram matrices by row and by column of the elements from the first cut to the last, in pieces."""
    n = len(inputs)
    by_row, by_column = np.zeros((shape[0], n, n)), np.zeros((n, n, shape[1]))
    for start, stop in pairwise(cuts):
        raw, codes = pack([x[start:stop] for x in inputs], dtypes)
        kernels.row_grams(raw, codes, base, shape[1], 0, start, stop - start, by_row)
        kernels.column_grams(raw, codes, base, shape[1], start, stop - start, by_column)
    return by_row, np.moveaxis(by_column, -1, 0)


@pytest.mark.parametrize("base", [-1, 0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_grams_are_sums_of_float64_products(kernels, shape, base, dtype):
    inputs = models(shape)
    held = np.stack([np.float64(stored32(x, dtype)) for x in inputs])
    if base >= 0:
        held = np.float64(np.float32(held - held[base]))  # deltas are float32
    size = inputs[0].size
    cuts = [1024, min(size, 3072), size]
    held[:, :1024] = 0
    by_row, by_column = grams(kernels, shape, inputs, [dtype] * 3, base, cuts)
    x = held.reshape(3, *shape)
    for got, want in ((by_row, np.einsum("arc,brc->rab", x, x)), (by_column, np.einsum("arc,brc->cab", x, x))):
        scale = np.einsum("arc,arc->", x, x)
        assert abs(got - np.triu(want)).max() <= 1e-13 * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_blocks_begin_does_not_matter(shape):
    inputs, size = models(shape), shape[0] * shape[1]
    whole = grams(cpu, shape, inputs, [F32] * 3, 0, [0, size])
    parts = grams(cpu, shape, inputs, [F32] * 3, 0, [*range(0, size, 1024), size])
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_products_that_float32_cannot_hold(kernels):
    inputs = [np.full(2048, v, np.float32) for v in (1e25, 3e-25)]
    raw, codes = pack(inputs, [F32, F32])
    totals, rows, columns = np.zeros((2, 2)), np.zeros((2, 2, 2)), np.zeros((2, 2, 1024))
    kernels.gram(raw, codes, -1, 2048, totals)
    kernels.row_grams(raw, codes, -1, 1024, 0, 0, 2048, rows)
    kernels.column_grams(raw, codes, -1, 1024, 0, 2048, columns)
    exact = np.triu(np.outer([np.float64(x[0]) for x in inputs], [np.float64(x[0]) for x in inputs]))
    np.testing.assert_allclose(totals, 2048 * exact, rtol=1e-12)
    np.testing.assert_allclose(rows, np.broadcast_to(1024 * exact, rows.shape), rtol=1e-12)
    np.testing.assert_allclose(columns, np.broadcast_to(2 * exact[..., None], columns.shape), rtol=1e-12)


@pytest.mark.parametrize("base", [-1, 0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by", ["rows", "columns"])
@pytest.mark.parametrize("out", [F32, BF16], ids=str)
def test_sums_take_the_coefficient_of_each_vector(kernels, shape, base, by, out):
    inputs = models(shape)
    inner, vectors = (shape[1], shape[0]) if by == "rows" else (1, shape[1])
    table = np.random.default_rng(3).standard_normal((3, vectors)).astype(np.float32)
    size = inputs[0].size
    places = np.arange(size)
    c = table[:, places // inner % vectors]
    origin = inputs[base] if base >= 0 else np.zeros(size, np.float32)
    want = np.zeros(size, np.float32)
    for m in range(3):
        if m != base:
            want += c[m] * (inputs[m] - origin)
    want = stored32(want + origin, out)
    for start, stop in ((0, size), (2048, size), (1024, min(size, 2077))):
        raw, codes = pack([x[start:stop] for x in inputs], [F32] * 3)
        result = np.zeros((stop - start) * out.size, np.uint8)
        assert kernels.weighted_vectors(raw, codes, table, base, inner, start, stop - start, result, cpu.CODES[out])
        assert np.array_equal(unpack(result, out, stop - start), want[start:stop])


def test_sums_tell_of_what_is_not_finite(kernels):
    raw, codes = pack([np.float32([1, 2, 3, 4])], [F32])
    table = np.float32([[1, 2e38]])
    out = np.zeros(16, np.uint8)
    assert not kernels.weighted_vectors(raw, codes, table, -1, 2, 0, 4, out, cpu.CODES[F32])
