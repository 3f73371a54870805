"""Normal random numbers by element: the noise that a mixture may put on its experts."""

from __future__ import annotations

import math

import numpy as np

from mergekit.kernels.jit import kernel
from mergekit.kernels.philox import GROUP, fill_random


@kernel
def add_noise(values: np.ndarray, first: int, key0: int, key1: int, scale: float) -> None:
    """Add ``scale`` times a standard normal number to each of ``values`` (float32), elements ``first ..`` of a tensor.

    Elements 2j and 2j + 1 take the cosine and the sine of one Box-Muller pair made from their two random words, so a
    number depends on (key, element) only. Computed in float64.
    """
    words = np.empty(GROUP, np.uint32)
    filled = -1
    for i in range(len(values)):
        element = first + i
        group, lane = element // GROUP, element % GROUP
        if group != filled:
            fill_random(group * GROUP, key0, key1, words)
            filled = group
        pair = lane - lane % 2
        # 2^-33 keeps the logarithm away from zero.
        radius = math.sqrt(-2.0 * math.log(words[pair] * 2.0**-32 + 2.0**-33))
        angle = 2.0 * math.pi * (words[pair + 1] * 2.0**-32)
        turn = math.cos(angle) if lane % 2 == 0 else math.sin(angle)
        values[i] = np.float32(values[i] + scale * radius * turn)
