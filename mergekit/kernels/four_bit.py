"""Kernels of 4-bit quantisation: numbers to what is left of them, and packed numbers back.

A tensor is cut, in the order of storage, into blocks of 64 (or another power of two). A block keeps the largest
magnitude, its *scale*, and for each element the nearest of 16 numbers in [-1, 1] times that scale. NF4 (Dettmers et al.
2023, "QLoRA", appendix E) takes the quantiles of a normal distribution, FP4 the values of a 4-bit float. With double
quantisation the scales, less their mean, are themselves rounded to 8 bits in blocks of 256.
"""

from __future__ import annotations

import numpy as np

from mergekit.kernels.codec import as_bits, as_float, float_to_bfloat, float_to_half, half_to_float
from mergekit.kernels.jit import kernel

__all__ = ["BLOCK", "DOUBLE_BLOCK", "double_quantize", "dynamic_map", "largest", "levels", "requantize", "unpack"]

BLOCK = 64
"""Elements that share a scale."""
DOUBLE_BLOCK = 256
"""Scales that share a scale, under double quantisation."""

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_SMALLEST_SCALE = 1e-38
"""A block of zeros is divided by this."""


def levels(scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of ``nf4`` or ``fp4`` in ascending order (float32 [n]), and the bounds between them ([n - 1]).

    >>> len(levels("nf4")[0]), len(levels("fp4")[0])
    (16, 15)
    """
    if scheme == "nf4":
        table = np.array(_NF4, np.float32)
    else:
        positive = np.array(_FP4, np.float32) / np.float32(12)
        table = np.concatenate([-positive[:0:-1], positive])
    return table, (table[:-1] + table[1:]) / np.float32(2)


@kernel
def largest(values: np.ndarray, block: int, scales: np.ndarray) -> None:
    """The largest magnitude of each block of ``values`` (float32 [count]) into ``scales`` (float32 [blocks])."""
    for b in range(len(scales)):
        part = values[b * block : (b + 1) * block]
        most = np.uint32(0)
        for i in range(len(part)):  # for floats, the order of bits is the order of magnitudes
            most = max(most, np.uint32(as_bits(part[i]) & np.uint32(0x7FFFFFFF)))
        scales[b] = as_float(most)


@kernel
def round_to(values: np.ndarray, code: int) -> None:
    """Round ``values`` (float32 [count]) to the element type with run-time number ``code``, in place."""
    if code == 0:
        for i in range(len(values)):
            values[i] = as_float(np.uint32(np.uint32(float_to_bfloat(values[i])) << np.uint32(16)))
    elif code == 1:
        for i in range(len(values)):
            values[i] = half_to_float(float_to_half(values[i]))


@kernel
def requantize(
    values: np.ndarray, block: int, table: np.ndarray, bounds: np.ndarray, scales: np.ndarray, code: int
) -> None:
    """Replace ``values`` (float32 [count], from the start of a block) by what quantising leaves of them.

    ``scales`` float32 [blocks] are the scales to multiply by in the end; with none, each block's own. The result is
    rounded to the element type ``code``. NaN stays NaN.
    """
    index = np.empty(block, np.int32)
    scaled = np.empty(block, np.float32)
    own = np.empty(1, np.float32)
    for start in range(0, len(values), block):
        part = values[start : start + block]
        largest(part, block, own)
        inverse = np.float32(1) / max(own[0], np.float32(_SMALLEST_SCALE))
        scale = scales[start // block] if len(scales) else own[0]
        for i in range(len(part)):
            scaled[i] = part[i] * inverse
            index[i] = 0
        for k in range(len(bounds)):
            bound = bounds[k]
            for i in range(len(part)):
                index[i] += np.int32(scaled[i] > bound)
        for i in range(len(part)):
            value = part[i]
            result = table[index[i]] * scale
            part[i] = result if value == value else value
    round_to(values, code)


@kernel
def unpack(
    raw: np.ndarray, first: int, block: int, table: np.ndarray, scales: np.ndarray, code: int, out: np.ndarray
) -> None:
    """Elements ``first ..`` of a packed tensor into ``out`` (float32 [count]), rounded to the element type ``code``.

    ``raw`` uint8 starts with the byte that holds element ``first``; the high half of a byte is the earlier element.
    ``table`` float32 [16], ``scales`` float32 [blocks of the whole tensor].
    """
    begin = first - first % 2
    for i in range(len(out)):
        element = first + i
        byte = raw[(element - begin) // 2]
        nibble = byte >> np.uint8(4) if element % 2 == 0 else byte & np.uint8(15)
        out[i] = table[nibble] * scales[element // block]
    round_to(out, code)


def dynamic_map() -> np.ndarray:
    """The 256 numbers of the dynamic 8-bit type in ascending order, float32 (Dettmers 2016, arXiv:1511.04561).

    A sign, n zeros, a one, and a linear fraction in the 6 - n bits that are left: the middle of each of 2^(6 - n) equal
    parts of [0.1, 1], times 10^-n. Zero and one are there besides.
    """
    found = [np.float32(0), np.float32(1)]
    for zeros in range(7):
        # The edges are counted from both ends with a float32 step, as torch.linspace does: the tables of checkpoints
        # are made so, and a middle that is off in its last bit would be another number.
        parts = 2 ** (6 - zeros)
        low = np.float64(np.float32(0.1))
        step = np.float64(np.float32(1 - low) / np.float32(parts))
        place = np.arange(parts + 1)
        edges = np.where(place < (parts + 1) // 2, low + step * place, 1 - step * place[::-1]).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0**-zeros)
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


@np.errstate(over="ignore", invalid="ignore")  # what is not finite shows in the result
def double_quantize(scales: np.ndarray) -> np.ndarray:
    """What double quantisation leaves of the scales of a tensor, float32 [blocks]."""
    offset = np.float32(scales.mean(dtype=np.float64))
    table = dynamic_map()
    bounds = (table[:-1] + table[1:]) / np.float32(2)
    result = np.empty_like(scales)
    for start in range(0, len(scales), DOUBLE_BLOCK):
        part = scales[start : start + DOUBLE_BLOCK] - offset
        most = np.abs(part).max()
        nearest = np.searchsorted(bounds, part * (np.float32(1) / max(most, np.float32(_SMALLEST_SCALE))))
        result[start : start + DOUBLE_BLOCK] = table[nearest] * most + offset
    return result
