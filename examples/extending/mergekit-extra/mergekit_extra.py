"""A package of merge methods: this one file, and the entry point in pyproject.toml."""

import numpy as np

from mergekit.methods import Real, Span, method, once


@method(
    "extrapolate",
    form=Span("deltas"),
    base="required",
    models=(2, 2),
    params=[once("factor", Real(), help="1 gives the model, more goes beyond it")],
)
def extrapolate(gram, *, factor):
    """A model moved away from its base, or back towards it.

    >>> extrapolate(None, factor=1.5)
    array([1.5])
    """
    return np.array([factor])
