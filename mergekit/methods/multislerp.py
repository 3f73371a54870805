"""A mean direction of many models, on the sphere."""

from __future__ import annotations

import math

import numpy as np

from mergekit.methods.angles import lengths
from mergekit.methods.spec import Flag, ParameterError, Real, Span, each, method, once

_LEAST_SHARE = 1e-6


def _check(*, weight: tuple[float, ...], normalize_weights: bool, eps: float) -> None:
    if eps <= 0:
        raise ParameterError(f"eps is {eps:g}; it must be greater than 0")
    mass = sum(map(abs, weight))
    if normalize_weights and len(weight) > 1 and abs(sum(weight)) <= 1e-12 * mass:
        raise ParameterError("the weights sum to zero; change them, or set normalize_weights: false")


@method(
    "multislerp",
    title="Multi-SLERP",
    form=Span("deltas", gram=True),
    base="optional",
    models=(1, None),
    paper="Goddard, Multi-SLERP (no paper; a barycentric mean on the sphere by one tangent step)",
    url="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea/",
    params=[
        each("weight", Real(), help="weight of the model (relative if normalized)"),
        once("normalize_weights", Flag(), True, help="divide the weights by their sum"),
        once("eps", Real(0.0), 1e-8, help="added to lengths before dividing; a mean shorter than it has no direction"),
    ],
    check=_check,
    laws=("equal", "symmetric"),
)
def multislerp(gram: np.ndarray, *, weight: tuple[float, ...], normalize_weights: bool, eps: float) -> np.ndarray:
    """Weighted mean of directions times the weighted mean of lengths, of models or of task vectors if there is a base.

    With n_i the lengths, u_i = x_i / (n_i + eps) and m = sum_i w_i u_i, the result is (m / |m|) sum_i w_i n_i. The
    weights are divided by their sum first, if ``normalize_weights``; a sum of zero is then refused.

    The definition goes on from m / |m| by one step along the tangent sum_i w_i (u_i - (u_i.m) m / |m|^2), but that is
    zero for every input, so the step is left out (arcee mergekit then scales by cos(eps)). Directions that cancel
    (|m| below eps, or below a millionth of sum_i |w_i|) have no mean: the result is sum_i w_i x_i, for any number of
    models, where arcee mergekit fails for more than two. A single model is returned as it is, whatever its weight.

    >>> multislerp(np.eye(2), weight=(1, 1), normalize_weights=True, eps=1e-8).round(4)
    array([0.7071, 0.7071])
    """
    if len(weight) == 1:
        return np.ones(1)
    share = np.array(weight, np.float64)
    mass = float(np.abs(share).sum())
    if normalize_weights:
        mass, share = mass / abs(float(share.sum())), share / share.sum()
    long = lengths(gram)
    units = np.where(long > 0, share / (long + eps), 0.0)
    mean = math.sqrt(max(0.0, float(units @ gram @ units)))
    if mean < max(eps, _LEAST_SHARE * mass):
        return share
    return units * (float(share @ long) / mean)
