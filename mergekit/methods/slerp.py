"""Spherical linear interpolation between two models."""

from __future__ import annotations

import math

import numpy as np

from mergekit.methods.angles import cosines
from mergekit.methods.spec import Real, Span, method, once

_MOST_COSINE = 0.9995


@method(
    "slerp",
    title="SLERP",
    form=Span("weights", gram=True),
    base="required",
    models=(2, 2),
    paper="Shoemake 1985, Animating rotation with quaternion curves",
    url="https://doi.org/10.1145/325334.325242",
    params=[once("t", Real(), help="0 gives the base model, 1 the other")],
    lone="pass",
    laws=("equal",),
)
def slerp(gram: np.ndarray, *, t: float) -> np.ndarray:
    """Interpolation along the great circle between two models.

    With theta the angle between the tensors taken as vectors, the coefficients are
    sin((1-t) theta)/sin(theta) for the base and sin(t theta)/sin(theta) for the other model. Vectors that are nearly
    parallel or antiparallel (|cos| > 0.9995) are interpolated linearly; one of length zero counts as orthogonal. (In
    arcee mergekit one shorter than 1e-8 does.)

    >>> slerp(np.eye(2), t=0.5).round(4)
    array([0.7071, 0.7071])
    """
    cosine = float(cosines(gram)[0, 1])
    if abs(cosine) > _MOST_COSINE:
        return np.array([1.0 - t, t])
    theta = math.acos(cosine)
    return np.array([math.sin((1.0 - t) * theta), math.sin(t * theta)]) / math.sin(theta)
