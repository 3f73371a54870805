"""NearSwap: take over the other model's value where it is near the base's."""

from __future__ import annotations

from typing import Any

from mergekit.methods.spec import Elementwise, Real, method, once

_LEAST_DISTANCE = 1e-6


@method(
    "nearswap",
    title="NearSwap",
    form=Elementwise(),
    base="required",
    models=(2, 2),
    paper="alchemonaut 2024, QuartetAnemoi-70B-t0.0001 (model card)",
    url="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    params=[once("t", Real(), help="distance up to which the other model's value is taken whole")],
    laws=("equal", "deltas"),
)
def nearswap(xp: Any, x: tuple[Any, ...], *, t: float) -> Any:
    """Interpolation towards another model, the further the nearer its values are.

    With d the difference from the base, the result is base + w d, where w = clip(t / max(|d|, 1e-6), 0, 1): differences
    up to ``t`` are taken whole, of larger ones a step of length ``t``. Those below 1e-6 count as 1e-6, which matters
    for smaller ``t`` only. A ``t`` of 0 or below leaves the base.

    >>> import numpy as np
    >>> nearswap(np, (np.array([0.01, -0.04, 0.5]),), t=0.02)
    array([ 0.01, -0.02,  0.02])
    """
    (delta,) = x
    step = max(t, 0.0)
    # w d without a division: it is d, or so much of it as the floor leaves, but at most a step.
    return xp.clip(delta * min(1.0, step / _LEAST_DISTANCE), -step, step)
