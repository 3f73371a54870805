"""Lengths of vectors and angles between them, from their Gram matrix."""

from __future__ import annotations

import numpy as np

__all__ = ["cosines", "lengths"]


def lengths(gram: np.ndarray) -> np.ndarray:
    """The lengths of n vectors: float64 [..., n] from their inner products [..., n, n].

    >>> lengths(np.array([[9.0, 0.0], [0.0, 16.0]]))
    array([3., 4.])
    """
    found: np.ndarray = np.sqrt(np.maximum(np.diagonal(gram, axis1=-2, axis2=-1), 0.0))
    return found


def cosines(gram: np.ndarray) -> np.ndarray:
    """The cosines of the angles between n vectors, float64 [..., n, n], within -1 and 1; 0 for a vector of length 0.

    >>> cosines(np.array([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    array([[1. , 0.5, 0. ],
           [0.5, 1. , 0. ],
           [0. , 0. , 0. ]])
    """
    long = lengths(gram)
    # Divided by one length and then the other: the product of two could overflow or vanish.
    inverse = np.divide(1.0, long, out=np.zeros_like(long), where=long > 0)
    found: np.ndarray = np.clip(gram * inverse[..., :, None] * inverse[..., None, :], -1.0, 1.0)
    return found
