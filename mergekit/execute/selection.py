"""Exact selection of the k largest: what histograms tell about the k-th."""

from __future__ import annotations

import numpy as np

__all__ = ["locate"]


def locate(histogram: np.ndarray, count: int) -> tuple[int, int]:
    """The bin in which the ``count``-th largest entry falls, and its rank inside that bin."""
    above = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(above, count))
    return len(histogram) - 1 - place, count - int(above[place] - histogram[::-1][place])
