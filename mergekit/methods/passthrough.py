"""One model's tensors as they are, or scaled."""

from __future__ import annotations

import numpy as np

from mergekit.methods.spec import Real, Span, each, method


@method(
    "passthrough",
    title="Passthrough",
    form=Span("weights"),
    base="ignored",
    models=(1, 1),
    paper=None,
    url=None,
    params=[each("scale", Real(), None, help="factor on the tensor; without it the tensor is copied", base=True)],
)
def passthrough(gram: None, *, scale: tuple[float | None, ...]) -> np.ndarray:
    """The tensors of one model, unchanged or multiplied by ``scale``.

    >>> passthrough(None, scale=(None,))
    array([1.])
    """
    return np.array([1.0 if s is None else s for s in scale], np.float64)
