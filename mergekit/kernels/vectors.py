"""Kernels of the ``span`` form where a tensor is many vectors: its rows or its columns, each with its own coefficients.

Element e of a tensor belongs to vector (e // inner) mod ``vectors``. For rows ``inner`` is their length; for columns
(the elements with equal index modulo the size of all axes but the first) it is 1. Buffers are as in ``span``; ``index``
is the place in the tensor of the first of their ``count`` elements. The result depends neither on where blocks begin
nor on how long they are, as long as they begin at multiples of 1,024.
"""

from __future__ import annotations

import numpy as np

from mergekit.kernels.codec import BLOCK, decode, encode
from mergekit.kernels.jit import kernel
from mergekit.kernels.span import GRAM_BLOCK, load_vectors, wide_dot


@kernel
def row_grams(
    raw: np.ndarray, codes: np.ndarray, base: int, inner: int, first: int, index: int, count: int, totals: np.ndarray
) -> None:
    """Add inner products by rows to ``totals`` (float64 [rows from ``first`` on, models, models], upper triangles).

    With ``base`` >= 0 the products are those of the deltas x_m - x_base (the base's own stay zero), with -1 of the
    models themselves; float64, as in ``span.gram``.
    """
    n = len(codes)
    values = np.empty((n, GRAM_BLOCK), np.float32)
    origin = np.empty(GRAM_BLOCK, np.float32)
    for at in range(0, count, GRAM_BLOCK):
        size = min(GRAM_BLOCK, count - at)
        load_vectors(raw, codes, base, at, size, origin, values)
        head = 0
        while head < size:
            row = (index + at + head) // inner
            end = min(size, (row + 1) * inner - index - at)
            for a in range(n):
                for b in range(a, n):
                    if base not in (a, b):
                        totals[row - first, a, b] += wide_dot(values[a, head:end], values[b, head:end], end - head)
            head = end


@kernel
def column_grams(
    raw: np.ndarray, codes: np.ndarray, base: int, columns: int, index: int, count: int, totals: np.ndarray
) -> None:
    """Add inner products by columns to ``totals`` (float64 [models, models, columns], upper triangles).

    See ``row_grams``. Elements are added in their order, a tile of columns at a time: its totals stay in the cache.
    """
    n = len(codes)
    values = np.empty((n, GRAM_BLOCK), np.float32)
    origin = np.empty(GRAM_BLOCK, np.float32)
    phase = index % columns
    for left in range(0, columns, GRAM_BLOCK):
        right = min(left + GRAM_BLOCK, columns)
        for row in range(-phase, count, columns):
            head, end = max(0, row + left), min(count, row + right)
            if head >= end:
                continue
            size = end - head
            load_vectors(raw, codes, base, head, size, origin, values)
            for a in range(n):
                for b in range(a, n):
                    if base not in (a, b):
                        x, y, total = values[a], values[b], totals[a, b, head - row : end - row]
                        for i in range(size):
                            total[i] += np.float64(x[i]) * np.float64(y[i])


@kernel
def weighted_vectors(
    raw: np.ndarray, codes: np.ndarray, table: np.ndarray, base: int, inner: int, index: int, count: int,
    out: np.ndarray, out_code: int,
) -> bool:  # fmt: skip
    """out = b + sum_m c_mv (x_m - b) with b = row ``base``, v the element's vector; without b if ``base`` is -1.

    ``table`` holds the coefficients, float32 [models, vectors]; the base's own are not used. Rounded once; True if
    the result is finite.
    """
    total = np.empty(BLOCK, np.float32)
    value = np.empty(BLOCK, np.float32)
    origin = np.zeros(BLOCK, np.float32)
    factor = np.empty(BLOCK, np.float32)
    finite = True
    for at in range(0, count, BLOCK):
        size = min(BLOCK, count - at)
        if base >= 0:
            decode(raw[base], codes[base], at, size, origin)
        total[:] = 0
        for m in range(len(codes)):
            if m == base:
                continue
            decode(raw[m], codes[m], at, size, value)
            _spread(table[m], index + at, size, inner, factor)
            for i in range(size):
                total[i] += factor[i] * (value[i] - origin[i])
        for i in range(size):
            total[i] += origin[i]
        finite &= encode(total, size, out, out_code, at)
    return finite


@kernel
def _spread(coefficients: np.ndarray, index: int, count: int, inner: int, factor: np.ndarray) -> None:
    """The coefficient of each of ``count`` elements, by its vector."""
    vectors = len(coefficients)
    at = 0
    if inner == 1:
        vector = index % vectors
        while at < count:
            run = min(count - at, vectors - vector)
            target, source = factor[at : at + run], coefficients[vector : vector + run]
            for i in range(run):
                target[i] = source[i]
            at, vector = at + run, 0
        return
    while at < count:
        vector = (index + at) // inner
        end = min(count, (vector + 1) * inner - index)
        c, target = coefficients[vector], factor[at:end]
        for i in range(end - at):
            target[i] = c
        at = end
