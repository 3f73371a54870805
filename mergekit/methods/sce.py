"""SCE: select entries by their variance, calculate weights from squares, erase minority signs."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit.methods.spec import Elementwise, Flag, Real, ignored, method, once

_TINY = 1e-30
"""Divides zero by something, and is lost beside any weight that matters."""


def _variance(xp: Any, x: tuple[Any, ...], *, select_topk: float) -> Any:
    """The variance over the models but for a factor: the order is what matters.

    Measured from the first model, so that models which agree have a variance of exactly zero.
    """
    if len(x) <= 2:
        difference = x[-1] - x[0]
        return difference * difference
    parts = [delta - x[0] for delta in x[1:]]
    mean = sum(parts[1:], parts[0]) * (1.0 / len(x))
    squares = mean * mean
    for part in parts:
        difference = part - mean
        squares = squares + difference * difference
    return squares


def _selected(nonzero: int, size: int, *, select_topk: float) -> int | None:
    """floor(nonzero * select_topk), as float32 computes it, like arcee mergekit; None from 1 upwards."""
    if select_topk >= 1:
        return None
    return min(nonzero, int(np.float32(nonzero) * np.float32(max(select_topk, 0.0))))


def _squares(xp: Any, x: tuple[Any, ...], *, select_topk: float) -> Any:
    return xp.stack([xp.sum(delta * delta) for delta in x])


@method(
    "sce",
    title="SCE",
    form=Elementwise(key=_variance, keep=_selected, measure=_squares),
    base="required",
    models=(1, None),
    paper="Wan et al. 2024, FuseChat: knowledge fusion of chat models",
    url="https://arxiv.org/abs/2408.07990",
    params=[
        once("select_topk", Real(usual=(0, 1)), 1.0, help="fraction of the entries on which models differ to keep"),
        ignored("int8_mask", Flag(), help="changes nothing: sign masks are never stored"),
    ],
    laws=("equal", "symmetric", "deltas"),
)
def sce(xp: Any, x: tuple[Any, ...], sums: np.ndarray, *, select_topk: float) -> Any:
    """Task vectors merged where they differ most, weighted by their squares, by the majority's sign.

    Select: of the entries whose variance over the models is not zero, the ``select_topk`` share of largest variance
    (all entries from 1 upwards, none at 0 or below). Calculate: a_i is model i's share of the sum of squares of what
    was selected. Erase: only entries with the sign of the sum of all count (zero sums count as positive). The result
    is base + sum_i a_i d_i / sum_i a_i over those that count. ``sums`` are the sums of squares.

    The weights are uniform if all squares are zero; arcee mergekit makes them so whenever the mean squares sum to less
    than 1e-6, as those of most fine-tuned models do.

    >>> import numpy as np
    >>> x = (np.array([1.0, -2.0], np.float32), np.array([3.0, 4.0], np.float32))
    >>> sce(np, x, np.array([5.0, 25.0]), select_topk=1.0).round(4)
    array([2.6667, 4.    ], dtype=float32)
    """
    sign = 2 * xp.asarray(sum(x[1:], x[0]) >= 0, dtype=xp.float32) - 1
    merged: Any = None
    total: Any = None
    for delta, share in zip(x, _shares(sums), strict=True):
        weight = xp.asarray(delta * sign > 0, dtype=xp.float32) * share
        merged = delta * weight if merged is None else merged + delta * weight
        total = weight + _TINY if total is None else total + weight
    return merged / total


def _shares(sums: np.ndarray) -> list[float]:
    """Each model's share of the sum."""
    total = float(sums.sum())
    return [1.0 / len(sums)] * len(sums) if total == 0 else [value / total for value in sums.tolist()]
