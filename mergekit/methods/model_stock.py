"""Model Stock: how far to go from the base to the mean of fine-tunes, by the angle between them."""

from __future__ import annotations

import numpy as np

from mergekit.methods.angles import cosines
from mergekit.methods.spec import Flag, Span, Vectors, method, once

_LEAST_DENOMINATOR = 1e-6


def _vectors(*, filter_wise: bool) -> Vectors:
    return "rows" if filter_wise else "tensor"


@method(
    "model_stock",
    title="Model Stock",
    form=Span("deltas", gram=True, vectors=_vectors),
    base="required",
    models=(3, None),
    paper="Jang et al. 2024, Model Stock: All we need is just a few fine-tuned models",
    url="https://arxiv.org/abs/2403.19522",
    params=[
        once("filter_wise", Flag(), False, help="an angle for each row (run along the last axis), not each tensor")
    ],
    lone="skip",
    laws=("equal", "symmetric", "deltas"),
)
def model_stock(gram: np.ndarray, *, filter_wise: bool) -> np.ndarray:
    """The base plus a share of the mean task vector: t mean_i x_i + (1 - t) base, with N models besides the base.

    With c the mean cosine over all pairs of task vectors, t = N c / (1 + (N - 1) c) (the paper's equation for N
    models), and t = 0 where that denominator is less than 1e-6. Task vectors that have nothing in common leave the
    base, equal ones give t = 1. t is not clamped: opposed ones (c < 0) lead away from their mean. A task vector of
    zero counts as orthogonal to all; unlike arcee mergekit no other length is small. Takes the base and at least two
    models.

    >>> model_stock(np.array([[1.0, 0.5], [0.5, 1.0]]), filter_wise=False).round(4)
    array([0.3333, 0.3333])
    """
    n = gram.shape[-1]
    above = np.triu_indices(n, 1)
    cosine = cosines(gram)[..., above[0], above[1]].mean(axis=-1)
    denominator = 1.0 + (n - 1) * cosine
    is_singular = np.abs(denominator) < _LEAST_DENOMINATOR
    t = np.where(is_singular, 0.0, n * cosine / np.where(is_singular, 1.0, denominator))
    return np.repeat(t[..., None] / n, n, axis=-1)
