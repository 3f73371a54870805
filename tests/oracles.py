"""Merge methods in plain float64 NumPy, written from the papers' formulas: what the kernels are held against.

Selections (largest magnitudes, random masks) are made on the float32 deltas, as the methods define them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def linear(models: list[Array], weight: list[float], normalize: bool = True) -> Array:
    """Weighted sum, divided by the sum of the weights."""
    total = sum(w * x for w, x in zip(weight, models, strict=True))
    return total / sum(weight) if normalize else total


def slerp(base: Array, other: Array, t: float) -> Array:
    """Great-circle interpolation of the flattened tensors; linear when nearly parallel."""
    norms = [max(np.linalg.norm(x), 0) for x in (base, other)]
    units = [x / (n if n > 1e-8 else 1) for x, n in zip((base, other), norms, strict=True)]
    cosine = float(np.clip((units[0] * units[1]).sum(), -1, 1))
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * other
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * base + np.sin(t * theta) * other) / np.sin(theta)


def task_arithmetic(base: Array, models: list[Array], weight: list[float], normalize=False, factor=1.0) -> Array:
    """base + factor * weighted sum of differences."""
    total = sum(w * (x - base) for w, x in zip(weight, models, strict=True))
    return base + factor * (total / sum(weight) if normalize else total)


def top_magnitude(delta32: NDArray[np.float32], density: float) -> NDArray[np.bool_]:
    """Which entries are among the k largest magnitudes; of equal ones, those of lower index."""
    flat = np.abs(delta32.reshape(-1))
    if density >= 1:
        return np.ones(delta32.shape, bool)
    if density <= 0 or not flat.size:
        return np.zeros(delta32.shape, bool)
    k = max(1, int(np.floor(density * flat.size)))
    order = np.lexsort((np.arange(flat.size), -flat))
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    return mask.reshape(delta32.shape)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 on Python integers (Salmon et al. 2011, section 3.3)."""
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = MULTIPLIERS[0] * x[0], MULTIPLIERS[1] * x[2]
        x = [b >> 32 ^ x[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ x[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + WEYL[0]) & 0xFFFFFFFF, (k[1] + WEYL[1]) & 0xFFFFFFFF]
    return x[0], x[1], x[2], x[3]


def random_mask(shape: tuple[int, ...], density: float, key: tuple[int, int]) -> NDArray[np.bool_]:
    """Element e takes lane (e mod 1024) div 256 of counter (e div 1024) * 256 + e mod 256."""
    size = int(np.prod(shape))
    if density >= 1:
        return np.ones(shape, bool)
    chance = round(density * 2**32)
    words = {c: philox((c, 0, 0, 0), key) for c in range(-(-size // 1024) * 256)}
    mask = [words[e // 1024 * 256 + e % 256][e % 1024 // 256] < chance for e in range(size)]
    return np.array(mask, bool).reshape(shape)


def sparse(
    base: Array,
    deltas: list[NDArray[np.float32]],
    masks: list[NDArray[np.bool_]],
    weight: list[float],
    *,
    consensus: bool,
    normalize: bool,
    rescale: bool,
    factor: float = 1.0,
) -> Array:
    """The task-vector family from masked deltas on: rescale, weight, elect signs, merge, add the base."""
    parts, elected = [], np.zeros(base.shape, np.float32)
    for delta, mask, w in zip(deltas, masks, weight, strict=True):
        exact = delta.astype(np.float64)
        kept = np.where(mask, exact, 0)
        before, after = np.abs(exact).sum(), np.abs(kept).sum()
        scale = before / after if rescale and after > 0 and not mask.all() else 1
        parts.append(w * kept * scale)
        # The sign is a selection, too: it is elected by float32 sums.
        elected = elected + np.float32(np.float32(w) * np.float32(scale)) * np.float32(kept)
    total = sum(parts)
    if consensus:
        sign = np.where(elected >= 0, 1, -1)
        agree = [np.sign(p) == sign for p in parts]
        total = sum(p * a for p, a in zip(parts, agree, strict=True))
        if normalize:
            share = sum(abs(w) * a for w, a in zip(weight, agree, strict=True))
            total = total / np.where(share == 0, 1, share)
    elif normalize and abs(sum(weight)) >= 1e-8:
        total = total / sum(weight)
    return base + factor * total
