"""From float32 results to storage: to the nearest number, or up or down at random so that the mean is right.

Stochastic rounding takes the upper neighbour with a probability equal to the share of the way there. A change smaller
than half a unit in the last place, which nearest rounding swallows everywhere, survives on average.
"""

from __future__ import annotations

import numpy as np

from mergekit.kernels.codec import BLOCK, as_bits, as_float, decode, encode
from mergekit.kernels.jit import kernel
from mergekit.kernels.philox import GROUP, fill_random

_BF16, _F16 = 0, 1


@kernel
def store(values: np.ndarray, count: int, out: np.ndarray, code: int) -> bool:
    """Round float32 [count] to the nearest numbers of type ``code``, into ``out`` (uint8). True if all are finite."""
    return encode(values, count, out, code, 0)


@kernel
def round_stochastically(
    values: np.ndarray, count: int, out: np.ndarray, code: int, index: int, key0: int, key1: int
) -> bool:
    """Round float32 [count] at random to a neighbour of 16 bits (bfloat16 or float16). True if all are finite.

    ``index`` is the place of the first element in its tensor, by which (with the key) the random numbers are chosen.
    """
    random = np.empty(GROUP, np.uint32)
    moved = np.empty(GROUP, np.float32)
    finite = True
    done = 0
    while done < count:
        skip = (index + done) % GROUP
        fill_random(index + done - skip, key0, key1, random)
        size = min(GROUP - skip, count - done)
        for i in range(size):
            moved[i] = _moved(values[done + i], random[skip + i], code)
        # What is left is exact in 16 bits, or not finite.
        finite &= encode(moved, size, out, code, done)
        done += size
    return finite


@kernel
def _moved(value: np.float32, random: np.uint32, code: int) -> np.float32:
    """A neighbour of ``value`` that type ``code`` holds exactly, as float32."""
    bits = as_bits(value)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if magnitude >= np.uint32(0x7F800000):
        return value
    if code == _BF16:
        low = np.uint32(0xFFFF)
    elif magnitude >= np.uint32(0x38800000):
        low = np.uint32(0x1FFF)
    else:  # below 2^-14 the float16 numbers are multiples of 2^-24
        units = np.float64(as_float(magnitude)) * 16777216.0
        chosen = np.float32(np.floor(units + np.float64(random) / 4294967296.0) / 16777216.0)
        return as_float(np.uint32(as_bits(chosen) | np.uint32(bits & np.uint32(0x80000000))))
    chosen_bits = np.uint32(np.uint32(bits + np.uint32(random & low)) & ~low)
    return as_float(chosen_bits)


@kernel
def count_nonfinite(out: np.ndarray, code: int, count: int) -> int:
    """How many of ``count`` elements of type ``code`` are NaN or infinite."""
    values = np.empty(BLOCK, np.float32)
    found = 0
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        decode(out, code, start, size, values)
        for i in range(size):
            found += 1 if np.uint32(as_bits(values[i]) & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F800000) else 0
    return found
