"""The Karcher mean of models: the point of the sphere that is nearest to all of them."""

from __future__ import annotations

import math

import numpy as np

from mergekit.methods.angles import cosines, lengths
from mergekit.methods.spec import Integer, ParameterError, Real, Span, method, once

_ANTIPODE = math.pi - 1e-3
_LEAST_MEAN = 1e-6


def _check(*, max_iter: int, tol: float) -> None:
    if tol <= 0:
        raise ParameterError(f"tol is {tol:g}; it must be greater than 0")


@method(
    "karcher",
    title="Karcher mean",
    form=Span("weights", gram=True),
    base="ignored",
    models=(1, None),
    paper="Karcher 1977, Riemannian center of mass and mollifier smoothing",
    url="https://doi.org/10.1002/cpa.3160300502",
    params=[
        once("max_iter", Integer(1), 10, help="the most steps"),
        once("tol", Real(0.0), 1e-5, help="stop when a step would be shorter than this, in radians"),
    ],
    check=_check,
    laws=("equal", "symmetric"),
)
def karcher(gram: np.ndarray, *, max_iter: int, tol: float) -> np.ndarray:
    """The mean of directions along great circles, times the mean length; all models count the same.

    With u_i the directions of the inputs and m their normalised mean, repeat at most ``max_iter`` times: theta_i is
    the angle between u_i and m, T = mean_i theta_i / sin(theta_i) (u_i - cos(theta_i) m), stop if |T| < ``tol``, move
    m by the angle |T| towards T. The result is m times the mean of the inputs' lengths. A base model is an input like
    any other, and a single input is returned as it is.

    Inputs of length zero have no direction, but count in the mean length. One within 0.001 of the antipode of m pulls
    in no direction, since every great circle leads there. If the directions cancel (their mean is shorter than 1e-6),
    m starts at the first of them. arcee mergekit uses ``tol`` as that bound, and ignores the direction of inputs
    shorter than it; here all lengths are alike.

    >>> karcher(np.eye(2), max_iter=10, tol=1e-5).round(4)
    array([0.7071, 0.7071])
    """
    n = len(gram)
    if n == 1:
        return np.ones(1)
    long = lengths(gram)
    found = np.flatnonzero(long)
    if not len(found):
        return np.zeros(n)
    units = cosines(gram)[np.ix_(found, found)]
    mean = _mean(units, max_iter, tol)
    coefficients = np.zeros(n)
    coefficients[found] = mean / long[found] * long.mean()
    return coefficients


def _mean(units: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """The coefficients of the Karcher mean in terms of unit vectors, whose inner products are ``units`` [n, n]."""
    n = len(units)
    mean = np.full(n, 1.0 / n)
    size = _length(mean, units)
    mean = mean / size if size >= _LEAST_MEAN else np.eye(n)[0]
    for _ in range(max_iter):
        cosine = np.clip(units @ mean, -1.0, 1.0)
        theta = np.arccos(cosine)
        # theta / sin(theta), which is 1 at 0: small angles need no guard.
        pull = np.where(theta < _ANTIPODE, 1.0 / np.sinc(np.minimum(theta, _ANTIPODE) / math.pi), 0.0) / n
        tangent = pull - (pull @ cosine) * mean
        angle = _length(tangent, units)
        if angle < tol:
            break
        mean = math.cos(angle) * mean + math.sin(angle) / angle * tangent
        mean /= _length(mean, units)
    return mean


def _length(coefficients: np.ndarray, units: np.ndarray) -> float:
    return math.sqrt(max(0.0, float(coefficients @ units @ coefficients)))
