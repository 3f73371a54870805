"""Weighted average of models ("model soup")."""

from __future__ import annotations

import numpy as np

from mergekit.methods.spec import Flag, ParameterError, Real, Span, each, method, once


@method(
    "linear",
    title="Linear",
    form=Span("weights"),
    base="ignored",
    models=(1, None),
    paper="Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned models",
    url="https://arxiv.org/abs/2203.05482",
    laws=("equal", "symmetric"),
    params=[
        each("weight", Real(), help="weight of the model (relative if normalized)", base=True),
        once("normalize", Flag(), True, help="divide by the sum of the weights"),
    ],
)
def linear(gram: None, *, weight: tuple[float, ...], normalize: bool) -> np.ndarray:
    """Weighted average of any number of models.

    sum_i w_i x_i, divided by sum_i w_i when ``normalize``. A base model is an input like any other.
    A weight sum of zero can't be normalized and is refused, where arcee mergekit writes infinities.

    >>> linear(None, weight=(1, 3), normalize=True)
    array([0.25, 0.75])
    """
    coefficients = np.array(weight, np.float64)
    if normalize:
        total = coefficients.sum()
        if abs(total) <= 1e-12 * np.abs(coefficients).sum() or total == 0:
            raise ParameterError("the weights sum to zero; change them, or set normalize: false")
        coefficients = coefficients / total
    return coefficients
