"""Sums of task vectors."""

from __future__ import annotations

import numpy as np

from mergekit.methods.rules import task_parameters
from mergekit.methods.spec import Span, method


@method(
    "task_arithmetic",
    title="Task arithmetic",
    form=Span("deltas"),
    base="required",
    models=(1, None),
    paper="Ilharco et al. 2022, Editing models with task arithmetic",
    url="https://arxiv.org/abs/2212.04089",
    laws=("equal", "zero", "symmetric", "deltas"),
    params=task_parameters(normalize=False, rescale=False, density=False),
)
def task_arithmetic(gram: None, *, weight: tuple[float, ...], normalize: bool, lambda_: float) -> np.ndarray:
    """Weighted sum of the models' differences from the base, added to the base.

    base + lambda * sum_i w_i (x_i - base), the sum divided by sum_i w_i when ``normalize`` (unless that
    is below 1e-8).

    >>> task_arithmetic(None, weight=(1.0, 0.5), normalize=False, lambda_=2.0)
    array([2., 1.])
    """
    coefficients = np.array(weight, np.float64)
    total = coefficients.sum()
    if normalize and abs(total) >= 1e-8:
        coefficients = coefficients / total
    return lambda_ * coefficients
