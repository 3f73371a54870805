"""What a block of models, or of a merge, tells: inner products of deltas and of the result, conflicts of sign."""

from __future__ import annotations

import numpy as np

from mergekit.kernels.codec import decode
from mergekit.kernels.jit import kernel
from mergekit.kernels.span import GRAM_BLOCK, dot, load_vectors


@kernel
def statistics(raw: np.ndarray, codes: np.ndarray, base: int, values: np.ndarray, out: np.ndarray, out_code: int,
               count: int, products: np.ndarray, counts: np.ndarray) -> None:  # fmt: skip
    """Add the figures of ``count`` elements to ``products`` and ``counts``.

    ``raw`` and ``codes`` are the models as in ``span``, ``values`` float32 [count] the result as computed and ``out``
    the same as stored. ``products`` (float64 [models + 2, models + 2], upper triangle) are inner products of the
    models' deltas, then the result's as computed and as stored (of these only the first's with the base, with itself
    and with the second); the base's own row is the base itself. With ``base`` -1 all are the tensors themselves.
    ``counts`` (int64 [2]): the elements that at least two models change, and those of them where the signs of the
    changes differ.
    """
    n = len(codes)
    rows = np.empty((n + 2, GRAM_BLOCK), np.float32)
    for start in range(0, count, GRAM_BLOCK):
        size = min(GRAM_BLOCK, count - start)
        for m in range(n):
            decode(raw[m], codes[m], start, size, rows[m])
        for i in range(size):
            rows[n, i] = values[start + i]
        decode(out, out_code, start, size, rows[n + 1])
        if base >= 0:
            for m in range(n + 2):
                if m != base:
                    for i in range(size):
                        rows[m, i] -= rows[base, i]
            _conflicts(rows, n, base, size, counts)
        for a in range(n):
            for b in range(a, n):
                products[a, b] += np.float64(dot(rows[a], rows[b], size))
        if base >= 0:
            products[base, n] += np.float64(dot(rows[base], rows[n], size))
        products[n, n] += np.float64(dot(rows[n], rows[n], size))
        products[n, n + 1] += np.float64(dot(rows[n], rows[n + 1], size))


@kernel
def _conflicts(rows: np.ndarray, n: int, base: int, size: int, counts: np.ndarray) -> None:
    up = np.zeros(GRAM_BLOCK, np.int32)
    down = np.zeros(GRAM_BLOCK, np.int32)
    for m in range(n):
        if m != base:
            for i in range(size):
                up[i] += rows[m, i] > np.float32(0)
                down[i] += rows[m, i] < np.float32(0)
    shared, torn = 0, 0
    for i in range(size):
        shared += (up[i] + down[i]) > 1
        torn += (up[i] > 0) & (down[i] > 0)
    counts[0] += shared
    counts[1] += torn


@kernel
def differences(raw: np.ndarray, codes: np.ndarray, count: int, products: np.ndarray, counts: np.ndarray) -> None:
    """Add what ``count`` elements tell about the deltas of models from the first one.

    ``raw`` and ``codes`` are the models as in ``span``. ``products`` (float64 [models, models], upper triangle) are
    inner products; row 0 is the first model itself, the others are deltas. ``counts`` (int64 [models, models]): on the
    diagonal the elements that a model changes, above it those that two models change, below it those of them that the
    two change in opposite directions.
    """
    n = len(codes)
    rows = np.empty((n, GRAM_BLOCK), np.float32)
    for start in range(0, count, GRAM_BLOCK):
        size = min(GRAM_BLOCK, count - start)
        load_vectors(raw, codes, 0, start, size, rows[0], rows)
        for a in range(n):
            for b in range(a, n):
                products[a, b] += np.float64(dot(rows[a], rows[b], size))
        for a in range(1, n):
            changed = 0
            for i in range(size):
                changed += rows[a, i] != np.float32(0)
            counts[a, a] += changed
            for b in range(a + 1, n):
                shared, torn = 0, 0
                for i in range(size):
                    x, y = rows[a, i], rows[b, i]
                    both = (x != np.float32(0)) & (y != np.float32(0))
                    shared += both
                    torn += both & ((x < np.float32(0)) != (y < np.float32(0)))
                counts[a, b] += shared
                counts[b, a] += torn
