"""What functions of chunks stand on: chunks of the inputs as float32 arrays, counts of their keys, results as stored.

The chunk functions are written for numpy and torch alike; ``arrays`` says which of the two a back end computes with.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from mergekit.kernels.codec import BLOCK, as_bits, decode
from mergekit.kernels.jit import kernel
from mergekit.kernels.sparse import count_low_bits

CHUNK = 1 << 17
"""Elements of a chunk. Smaller ones stay in faster caches, but then threads wait for the interpreter's lock more."""
ALL = -1
"""The threshold that selects all elements."""
TABLES = 4
"""Tables that take turns, so that equal neighbours don't wait for each other's increment."""


def arrays() -> ModuleType:
    """The module whose arrays ``load_chunk`` returns."""
    return np


def load_chunk(
    raw: np.ndarray, codes: np.ndarray, base: int, start: int, count: int, scratch: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Elements ``start .. start+count`` of each model as float32 arrays; minus the base's, for all models but it.

    ``raw`` and ``codes`` are as in ``span``, ``base`` -1 subtracts nothing. ``scratch`` is float32 [models, CHUNK],
    where the arrays may live until the next call.
    """
    _decode_chunk(raw, codes, base, start, count, scratch)
    return tuple(scratch[m, :count] for m in range(len(codes)))


def count_upper(keys: np.ndarray, totals: np.ndarray) -> int:
    """Count float32 ``keys`` by the 15 bits after the sign, into ``totals`` (int64 [4, 32768], to be added up).

    Returns how many of them are not zero.
    """
    return int(tally_upper(keys, totals))


def count_lower(keys: np.ndarray, upper: int, totals: np.ndarray) -> None:
    """Count the lower 16 bits of the float32 ``keys`` whose 15 bits before are ``upper``, into uint32 [65536]."""
    tally_lower(keys, upper, totals)


def keep_largest(
    x: tuple[np.ndarray, ...], keys: np.ndarray, threshold: int, left: int
) -> tuple[tuple[np.ndarray, ...], int]:
    """``x`` with zeros where the bits of ``keys`` are below ``threshold``; of ties only the first ``left`` stay.

    Returns how many ties are left for the chunks after. The arrays of ``load_chunk`` are changed in place.
    """
    kept = np.empty(len(keys), np.float32)
    # Once no tie is left to keep, none has to be looked for: keys are not negative, so their bits order like them.
    left = int(mark_largest(keys, np.uint32(threshold + (left == 0)), left, kept))
    for values in x:
        values *= kept
    return x, left


def on_host(values: np.ndarray) -> np.ndarray:
    """An array of the back end, in the machine's memory."""
    return values


@kernel
def _decode_chunk(raw: np.ndarray, codes: np.ndarray, base: int, start: int, count: int, out: np.ndarray) -> None:
    values = np.empty(BLOCK, np.float32)
    origin = np.zeros(BLOCK, np.float32)
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        if base >= 0:
            decode(raw[base], codes[base], start + first, size, origin)
        for m in range(len(codes)):
            row = out[m, first : first + size]
            if m == base or base < 0:
                decode(raw[m], codes[m], start + first, size, row)
                continue
            decode(raw[m], codes[m], start + first, size, values)
            for i in range(size):
                row[i] = values[i] - origin[i]


@kernel
def tally_upper(keys: np.ndarray, totals: np.ndarray) -> int:
    """``count_upper``, for kernels."""
    count, nonzero = len(keys), 0
    bins = np.empty(count, np.uint16)
    for i in range(count):
        nonzero += keys[i] != np.float32(0)
        bins[i] = np.uint16(np.uint32(as_bits(keys[i]) & np.uint32(0x7FFFFFFF)) >> np.uint32(16))
    t0, t1, t2, t3 = totals[0], totals[1], totals[2], totals[3]
    whole = count // TABLES * TABLES
    for i in range(0, whole, TABLES):
        t0[np.uint64(bins[i])] += 1
        t1[np.uint64(bins[i + 1])] += 1
        t2[np.uint64(bins[i + 2])] += 1
        t3[np.uint64(bins[i + 3])] += 1
    for i in range(whole, count):
        t0[np.uint64(bins[i])] += 1
    return nonzero


@kernel
def tally_lower(keys: np.ndarray, upper: int, totals: np.ndarray) -> None:
    """``count_lower``, for kernels."""
    bits = np.empty(len(keys), np.uint32)
    for i in range(len(keys)):
        bits[i] = as_bits(keys[i]) & np.uint32(0x7FFFFFFF)
    count_low_bits(bits, len(keys), np.uint32(upper), totals)


@kernel
def mark_largest(keys: np.ndarray, threshold: np.uint32, left: int, kept: np.ndarray) -> int:
    """Set ``kept`` (float32) to 1 for keys of at least ``threshold``, of ties the first ``left``; to 0 for others."""
    ties = np.uint32(0)
    for i in range(len(keys)):
        bits = np.uint32(as_bits(keys[i]) & np.uint32(0x7FFFFFFF))
        ties = np.uint32(ties + (np.uint32(1) if bits == threshold else np.uint32(0)))
        kept[i] = np.float32(1) if bits >= threshold else np.float32(0)
    if np.int64(ties) <= left or left == 0:
        return int(left - np.int64(ties)) if left else 0
    for i in range(len(keys)):
        if np.uint32(as_bits(keys[i]) & np.uint32(0x7FFFFFFF)) == threshold:
            if left > 0:
                left -= 1
            else:
                kept[i] = np.float32(0)
    return 0
