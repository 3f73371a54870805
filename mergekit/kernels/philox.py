"""The counter-based random generator Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A random number belongs to a (key, element index) pair and to nothing else, so masks are the same whatever the
number of threads, the block size or the order. Element e of a tensor takes lane (e mod 1024) div 256 of counter
(e div 1024) * 256 + (e mod 256): the four outputs of a counter land in four runs of consecutive elements, which is
what vector units like.
"""

from __future__ import annotations

import numpy as np

from mergekit.kernels.jit import kernel

GROUP = 1024
"""Elements that share a run of counters; work is cut at multiples of it."""

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_MUL0, _MUL1 = MULTIPLIERS
_WEYL0, _WEYL1 = WEYL
_LANE = GROUP // 4


@kernel
def fill_random(first: int, key0: int, key1: int, state: np.ndarray) -> None:
    """The random numbers of elements ``first .. first + 1024`` (``first`` a multiple of 1024) into ``state``.

    ``state`` is uint32 [1024]; the compiler runs several counters side by side in vector registers.
    """
    counter = np.uint64(first // GROUP * _LANE)
    low, high = np.uint32(counter), np.uint32(counter >> np.uint64(32))
    a, b, c, d = state[:_LANE], state[_LANE : 2 * _LANE], state[2 * _LANE : 3 * _LANE], state[3 * _LANE : 4 * _LANE]
    # 256 divides 2^32, so the low word never carries inside a group.
    for j in range(_LANE):
        x0, x1, x2, x3 = np.uint32(low + np.uint32(j)), high, np.uint32(0), np.uint32(0)
        k0, k1 = np.uint32(key0), np.uint32(key1)
        for _ in range(ROUNDS):
            p = np.uint64(_MUL0) * np.uint64(x0)
            q = np.uint64(_MUL1) * np.uint64(x2)
            x0 = np.uint32(np.uint32(q >> np.uint64(32)) ^ x1 ^ k0)
            x1 = np.uint32(q)
            x2 = np.uint32(np.uint32(p >> np.uint64(32)) ^ x3 ^ k1)
            x3 = np.uint32(p)
            k0 = np.uint32(k0 + np.uint32(_WEYL0))
            k1 = np.uint32(k1 + np.uint32(_WEYL1))
        a[j], b[j], c[j], d[j] = x0, x1, x2, x3
