"""A cheap checksum of what was written, for the journal: it finds torn and missing writes, not forgeries."""

from __future__ import annotations

import numpy as np

from mergekit.kernels.jit import kernel

_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@kernel
def _word_sum(words: np.ndarray, first: int) -> np.uint64:
    total = np.uint64(0)
    for i in range(len(words)):
        factor = np.uint64((np.uint64(first + i) * np.uint64(_STEP)) | np.uint64(1))
        total += np.uint64(words[i] * factor)
    return total


def checksum(data: np.ndarray, first: int) -> int:
    """The share of ``data`` (uint8 [bytes], ``first`` bytes into its tensor, a multiple of 8) in a tensor's checksum.

    Shares add up modulo 2^64, so blocks may come in any order and any size that is a multiple of 8 bytes (the last
    block of a tensor may have any size). Each 64-bit word is multiplied by an odd number that depends on its place.
    """
    whole = len(data) // 8 * 8
    total = int(_word_sum(data[:whole].view(np.uint64), first // 8))
    if whole < len(data):
        tail = np.zeros(8, np.uint8)
        tail[: len(data) - whole] = data[whole:]
        total += int(_word_sum(tail.view(np.uint64), (first + whole) // 8))
    return total & _MASK
