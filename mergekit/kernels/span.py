"""Kernels of the ``span`` form: weighted sums of models, and the Gram matrix of models or of their deltas.

Buffers are ``raw`` uint8 [models, bytes]: row m holds the same ``count`` elements of model m in its storage type
``codes[m]``. Arithmetic is float32. The inner products of a Gram matrix are multiplied and added in float64: float32
would overflow at 1e19 and lose the angle between fine-tunes of one model, whose cosine differs from 1 by 1e-8 or less.
"""

from __future__ import annotations

import numpy as np

from mergekit.kernels.codec import BLOCK, decode, encode
from mergekit.kernels.jit import kernel, reassociating_kernel

GRAM_BLOCK = 1024
"""Elements that are summed in lanes of vector registers before they are added to the total."""


@kernel
def weighted_sum(
    raw: np.ndarray, codes: np.ndarray, coefficients: np.ndarray, count: int, out: np.ndarray, out_code: int
) -> bool:
    """out = sum_m c_m x_m, rounded once. ``coefficients`` float32 [models]. True if the result is finite."""
    total = np.empty(BLOCK, np.float32)
    value = np.empty(BLOCK, np.float32)
    finite = True
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        decode(raw[0], codes[0], start, size, value)
        c = coefficients[0]
        for i in range(size):
            total[i] = c * value[i]
        for m in range(1, len(codes)):
            decode(raw[m], codes[m], start, size, value)
            c = coefficients[m]
            for i in range(size):
                total[i] += c * value[i]
        finite &= encode(total, size, out, out_code, start)
    return finite


@kernel
def weighted_delta_sum(
    raw: np.ndarray,
    codes: np.ndarray,
    coefficients: np.ndarray,
    base: int,
    count: int,
    out: np.ndarray,
    out_code: int,
) -> bool:
    """out = b + sum_m c_m (x_m - b) with b = row ``base`` (its own coefficient is not used), rounded once."""
    total = np.empty(BLOCK, np.float32)
    value = np.empty(BLOCK, np.float32)
    origin = np.empty(BLOCK, np.float32)
    finite = True
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        decode(raw[base], codes[base], start, size, origin)
        total[:] = 0
        for m in range(len(codes)):
            if m == base:
                continue
            decode(raw[m], codes[m], start, size, value)
            c = coefficients[m]
            for i in range(size):
                total[i] += c * (value[i] - origin[i])
        for i in range(size):
            total[i] += origin[i]
        finite &= encode(total, size, out, out_code, start)
    return finite


@reassociating_kernel
def dot(a: np.ndarray, b: np.ndarray, count: int) -> np.float32:
    """The inner product of ``count`` float32 numbers, summed in float32."""
    total = np.float32(0)
    for i in range(count):
        total += a[i] * b[i]
    return total


@reassociating_kernel
def wide_dot(a: np.ndarray, b: np.ndarray, count: int) -> np.float64:
    """The inner product of ``count`` float32 numbers, multiplied and summed in float64."""
    total = np.float64(0)
    for i in range(count):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@kernel
def load_vectors(
    raw: np.ndarray, codes: np.ndarray, base: int, start: int, count: int, origin: np.ndarray, values: np.ndarray
) -> None:
    """Elements ``start .. start+count`` of the models as float32 rows of ``values``.

    With ``base`` >= 0 less those of the base, which come to ``origin``; its own row is left as it is.
    """
    if base >= 0:
        decode(raw[base], codes[base], start, count, origin)
    for m in range(len(codes)):
        if m == base:
            continue
        row = values[m]
        decode(raw[m], codes[m], start, count, row)
        if base >= 0:
            for i in range(count):
                row[i] -= origin[i]


@kernel
def gram(raw: np.ndarray, codes: np.ndarray, base: int, count: int, totals: np.ndarray) -> None:
    """Add the inner products of ``count`` elements to ``totals`` (float64 [models, models], upper triangle).

    With ``base`` >= 0 the products are those of the deltas x_m - x_base (the base's own row stays zero); with -1,
    of the models themselves. Deltas are formed element by element: deriving their products from those of the
    weights would cancel away every digit.
    """
    n = len(codes)
    values = np.empty((n, GRAM_BLOCK), np.float32)
    origin = np.empty(GRAM_BLOCK, np.float32)
    for start in range(0, count, GRAM_BLOCK):
        size = min(GRAM_BLOCK, count - start)
        load_vectors(raw, codes, base, start, size, origin, values)
        for a in range(n):
            for b in range(a, n):
                if base not in (a, b):
                    totals[a, b] += wide_dot(values[a], values[b], size)
