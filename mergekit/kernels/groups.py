"""The kernel that keeps the largest entries of each group of a delta, group by group and model after model (CABS).

It fills ``gains`` (float32 [models, count]) for the rule KEEP_GIVEN of ``sparse``: 0 drops an entry. Buffers are as
in ``span``; blocks hold whole groups.
"""

from __future__ import annotations

import numpy as np

from mergekit.kernels.codec import as_bits, decode
from mergekit.kernels.jit import kernel

_MAGNITUDE = 0x7FFFFFFF


@kernel
def group_gains(raw: np.ndarray, codes: np.ndarray, base: int, wanted: np.ndarray, picks: np.ndarray, group: int,
                count: int, gains: np.ndarray) -> None:  # fmt: skip
    """Gain 1 for the ``picks[m]`` largest |delta| of each ``group`` elements, else 0, for the models with ``wanted``.

    A model chooses among the places that no model before it has; of equal magnitudes the first, all if there are
    fewer. ``picks`` is int64 [models]; a last group of g elements keeps max(1, floor(picks g / group)).
    """
    most = min(group, count)
    origin = np.empty(most, np.float32)
    delta = np.empty(most, np.float32)
    taken = np.empty(most, np.bool_)
    magnitudes = np.empty(most, np.int32)
    for start in range(0, count, group):
        size = min(group, count - start)
        decode(raw[base], codes[base], start, size, origin)
        taken[:] = False
        for m in range(len(codes)):
            if not wanted[m]:
                continue
            decode(raw[m], codes[m], start, size, delta)
            for i in range(size):
                bits = np.int32(as_bits(np.float32(delta[i] - origin[i])) & np.uint32(_MAGNITUDE))
                magnitudes[i] = np.int32(-1) if taken[i] else bits
            pick = picks[m] if size == group else picks[m] * size // group
            pick = max(pick, 1) if picks[m] > 0 else 0
            _take(magnitudes, size, pick, taken, gains[m, start : start + size])


@kernel
def _take(magnitudes: np.ndarray, size: int, pick: int, taken: np.ndarray, gain: np.ndarray) -> None:
    """Choose the ``pick`` largest magnitudes that are not negative: 1 in ``gain``, and ``taken``."""
    threshold = np.int32(0)
    for bit in range(30, -1, -1):  # bit by bit the largest number that enough entries reach
        trial = np.int32(threshold | np.int32(1 << bit))
        if _above(magnitudes, size, np.int32(trial - np.int32(1))) >= pick:
            threshold = trial
    left = pick - _above(magnitudes, size, threshold)
    for i in range(size):
        chosen = magnitudes[i] > threshold
        if magnitudes[i] == threshold and left > 0:
            left -= 1
            chosen = True
        gain[i] = np.float32(1) if chosen else np.float32(0)
        taken[i] |= chosen


@kernel
def _above(magnitudes: np.ndarray, size: int, threshold: np.int32) -> int:
    count = np.uint32(0)
    for i in range(size):
        count = np.uint32(count + (np.uint32(1) if magnitudes[i] > threshold else np.uint32(0)))
    return int(count)
