"""The elementwise methods in plain float64 NumPy, written from their formulas.

Like the methods, they take deltas as float32 holds them: what is selected or counted as a change depends on that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def deltas_of(base: Array, models: list[Array]) -> list[Array]:
    """The models' differences from the base, rounded to float32."""
    return [(np.float32(m) - np.float32(base)).astype(np.float64) for m in models]


def nearswap(base: Array, other: Array, t: float) -> Array:
    """w other + (1 - w) base, where w = clip(t / max(|other - base|, 1e-6), 0, 1)."""
    w = np.clip(t / np.maximum(np.abs(other - base), 1e-6), 0, 1)
    return w * other + (1 - w) * base


def selection(deltas: list[Array], topk: float) -> NDArray[np.bool_]:
    """The floor(nonzero * topk) entries of largest variance over the models; of equal ones those of lower index."""
    variance = np.var(np.stack(deltas), axis=0)
    if topk >= 1:
        return np.ones(variance.shape, bool)
    count = int(np.float32(np.count_nonzero(variance)) * np.float32(topk))
    order = np.lexsort((np.arange(variance.size), -variance.reshape(-1)))
    mask = np.zeros(variance.size, bool)
    mask[order[: max(count, 0)]] = True
    return mask.reshape(variance.shape)


def sce(base: Array, models: list[Array], topk: float = 1.0) -> Array:
    """Select, calculate, erase: base + sum a d m / sum a m."""
    deltas = deltas_of(base, models)
    mask = selection(deltas, topk)
    deltas = [d * mask for d in deltas]
    squares = np.array([np.mean(d**2) if d.size else 0.0 for d in deltas])
    share = squares / squares.sum() if squares.sum() > 0 else np.full(len(deltas), 1 / len(deltas))
    # The sign is a selection, too: it is elected by float32 sums.
    elected = np.zeros(base.shape, np.float32)
    for d in deltas:
        elected = elected + np.float32(d)
    agrees = [np.sign(d) == np.where(elected >= 0, 1, -1) for d in deltas]
    weight = sum(a * m for a, m in zip(share, agrees, strict=True))
    total = sum(a * m * d for a, m, d in zip(share, agrees, deltas, strict=True))
    return base + total / np.where(weight == 0, 1, weight)


def ram(base: Array, models: list[Array], epsilon: float = 1e-5) -> Array:
    """The mean of the changes larger than epsilon, over the models that made them."""
    deltas = deltas_of(base, models)
    changed = [np.abs(d) > np.float32(epsilon) for d in deltas]
    return base + sum(d * c for d, c in zip(deltas, changed, strict=True)) / np.maximum(sum(map(np.int64, changed)), 1)


def ramplus(base: Array, models: list[Array], epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2) -> Array:
    """RAM, element by element, where what one model alone changed is multiplied by that model's factor."""
    deltas = deltas_of(base, models)
    changed = np.stack([np.abs(d) > np.float32(epsilon) for d in deltas])
    count = changed.sum(axis=0)
    shared = [(c & (count > 1)).sum() for c in changed]
    unique = [(c & (count == 1)).sum() for c in changed]
    factor = [1 + r * np.clip(s / max(u, epsilon), 0, alpha) for s, u in zip(shared, unique, strict=True)]
    change = np.zeros(base.shape)
    for place in np.ndindex(base.shape):
        who = [m for m in range(len(deltas)) if changed[(m, *place)]]
        if len(who) == 1:
            change[place] = factor[who[0]] * deltas[who[0]][place]
        elif who:
            change[place] = np.mean([deltas[m][place] for m in who])
    return base + change
