"""Masks and merges of the sparse methods in plain NumPy, entry by entry from the papers' formulas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from oracles import philox

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def random_words(size: int, key: tuple[int, int]) -> NDArray[np.int64]:
    """The 32-bit random numbers of a tensor's elements."""
    words = {c: philox((c, 0, 0, 0), key) for c in range(-(-size // 1024) * 256)}
    return np.array([words[e // 1024 * 256 + e % 256][e % 1024 // 256] for e in range(size)], np.int64)


def band(delta: NDArray[np.float32], density: float, gamma: float) -> Mask:
    """Ascending positions [bottom, bottom + keep) of the magnitudes; of equal ones the first counts as the larger."""
    size = delta.size
    if density >= 1 or density <= 0:
        return np.full(delta.shape, density >= 1)
    keep, top = int(np.floor(density * size)), int(np.floor(gamma * size))
    bottom = max(0, size - keep - top)
    flat = np.abs(delta.reshape(-1))
    ascending = np.lexsort((-np.arange(size), flat))
    mask = np.zeros(size, bool)
    mask[ascending[bottom : bottom + keep]] = True
    return mask.reshape(delta.shape)


def rows_of(delta: NDArray[np.float32]) -> NDArray[np.float32]:
    """A matrix of what is ranked together."""
    return delta.reshape(delta.shape[0], -1) if delta.ndim > 1 else delta.reshape(1, -1)


def probabilities(delta: NDArray[np.float32], density: float, epsilon: float) -> Array:
    """(density - epsilon) + 2 epsilon r / (m - 1), with r the mean rank of |delta| in its row of m."""
    chances = []
    for row in np.abs(rows_of(delta)):
        below = np.array([(row < x).sum() for x in row])
        equal = np.array([(row == x).sum() for x in row])
        rank = below + (equal - 1) / 2
        m = len(row)
        chances.append(np.full(m, density) if m == 1 else density - epsilon + 2 * epsilon * rank / (m - 1))
    return np.array(chances, np.float64).reshape(delta.shape)


def by_rank(delta: NDArray[np.float32], density: float, epsilon: float, key: tuple[int, int]) -> tuple[Mask, Array]:
    """DELLA's mask, and the probability of each entry."""
    if density >= 1 or density <= 0 or not delta.size:
        return np.full(delta.shape, density >= 1), np.ones(delta.shape)
    chances = probabilities(delta, density, epsilon)
    return random_words(delta.size, key).reshape(delta.shape) < chances * 2**32, chances


def groups(deltas: Sequence[NDArray[np.float32]], counts: Sequence[int], m: int) -> list[Mask]:
    """CABS: model after model, the largest of each group among the places that are still free."""
    masks = [np.zeros(d.size, bool) for d in deltas]
    for start in range(0, deltas[0].size, m):
        free = list(range(start, min(start + m, deltas[0].size)))
        length = len(free)
        for delta, mask, n in zip(deltas, masks, counts, strict=True):
            keep = n if length == m else max(1, n * length // m) if n else 0
            flat = np.abs(delta.reshape(-1))
            for place in sorted(free, key=lambda i: (-flat[i], i))[:keep]:
                mask[place] = True
                free.remove(place)
    return [mask.reshape(d.shape) for mask, d in zip(masks, deltas, strict=True)]


def merge(
    base: Array,
    deltas: Sequence[NDArray[np.float32]],
    masks: Sequence[Mask],
    weight: Sequence[float],
    *,
    shares: Sequence[float | Array] | None = None,
    rescale: str = "none",
    consensus: bool = False,
    elect: str = "weighted",
    normalize: bool = False,
    factor: float = 1.0,
) -> tuple[Array, Array]:
    """The merge, and the size of the sum that elects each sign (where it is tiny, rounding may elect the other).

    ``shares`` are what rescaling by density divides by.
    """
    kept = []
    for i, (delta, mask) in enumerate(zip(deltas, masks, strict=True)):
        part = np.where(mask, delta.astype(np.float64), 0)
        after = np.abs(part).sum()
        if rescale == "density" and shares is not None:
            part = part / shares[i]
        if rescale == "l1" and after > 0 and not mask.all():
            part = part * (np.abs(delta.astype(np.float64)).sum() / after)
        kept.append(part)
    parts = [w * part for w, part in zip(weight, kept, strict=True)]
    votes = parts if elect == "weighted" else kept
    elected = np.sum(votes, axis=0)
    if consensus:
        sign = np.where(elected >= 0, 1, -1)
        agree = [np.sign(v) == sign for v in votes]
        total = np.sum([p * a for p, a in zip(parts, agree, strict=True)], axis=0)
        if normalize:
            share = np.sum([abs(w) * a for w, a in zip(weight, agree, strict=True)], axis=0)
            total = total / np.where(share == 0, 1, share)
    else:
        total = np.sum(parts, axis=0)
        total = total / sum(weight) if normalize else total
    return base + factor * total, np.abs(elected)
