"""Spherical interpolation with weights: of tensors, rows or columns, of models or of their task vectors."""

from __future__ import annotations

import math

import numpy as np

from mergekit.methods.angles import cosines
from mergekit.methods.spec import Flag, Real, Span, Vectors, each, method, once

_LEAST_TOTAL = 1e-6
_LEAST_SINE = 1e-6
_ANTIPODE = math.pi - 1e-3


def _vectors(*, nuslerp_flatten: bool, nuslerp_row_wise: bool, **others: object) -> Vectors:
    if nuslerp_flatten:
        return "tensor"
    return "columns" if nuslerp_row_wise else "rows"


@method(
    "nuslerp",
    title="NuSLERP",
    form=Span("deltas", gram=True, vectors=_vectors),
    base="optional",
    models=(2, 2),
    paper="Shoemake 1985, Animating rotation with quaternion curves",
    url="https://doi.org/10.1145/325334.325242",
    params=[
        each("weight", Real(), help="weight of the model; t is the second's share of the sum"),
        once("nuslerp_flatten", Flag(), True, help="take each tensor as one vector"),
        once(
            "nuslerp_row_wise",
            Flag(),
            False,
            help="if not flattened, the vectors run along the first axis (true) or along the last (false)",
        ),
    ],
    lone="pass",
    laws=("equal",),
)
def nuslerp(
    gram: np.ndarray, *, weight: tuple[float, float], nuslerp_flatten: bool, nuslerp_row_wise: bool
) -> np.ndarray:
    """Interpolation along the great circle between two models, or between their task vectors if there is a base.

    With t = w_1 / (w_0 + w_1) (1/2 if the sum's magnitude is less than 1e-6) and theta the angle between two vectors,
    the coefficients are sin((1-t) theta)/sin(theta) and sin(t theta)/sin(theta). Vectors on one line are interpolated
    linearly: of the same direction (sin(theta) at most 1e-6, where both are the same), or opposite within 0.001, where
    the great circle between them would be chosen by rounding. One of length zero counts as orthogonal.

    A vector is the whole tensor, unless ``nuslerp_flatten`` is false. Then it is each run along the last axis, which
    is a row of a matrix; with ``nuslerp_row_wise`` it is each run along the first axis, a column of a matrix. (The name
    says the opposite, but recipes depend on it.) Of a tensor with one axis both are the whole. Unlike arcee mergekit
    nothing depends on how long task vectors are, and angles are taken in float64 whatever the type of the models.

    >>> nuslerp(np.eye(2), weight=(1, 1), nuslerp_flatten=True, nuslerp_row_wise=False).round(4)
    array([0.7071, 0.7071])
    """
    total = weight[0] + weight[1]
    t = 0.5 if abs(total) < _LEAST_TOTAL else weight[1] / total
    theta = np.arccos(cosines(gram)[..., 0, 1])
    sine = np.sin(theta)
    is_line = (sine <= _LEAST_SINE) | (theta >= _ANTIPODE)
    parts = [np.where(is_line, part, np.sin(part * theta) / np.where(is_line, 1.0, sine)) for part in (1.0 - t, t)]
    return np.stack(parts, axis=-1)
