"""RAM: average each task vector's entry over the models that changed it."""

from __future__ import annotations

from typing import Any

from mergekit.methods.spec import Elementwise, Real, method, once

__all__ = ["TINY", "epsilon", "ram"]

TINY = 1e-30
"""Divides zero by something, and is lost beside a count of one or more."""

epsilon = once("epsilon", Real(0.0), 1e-5, help="differences from the base up to this size count as no change")


@method(
    "ram",
    title="Reinforced Agent Merging (RAM)",
    form=Elementwise(),
    base="required",
    models=(1, None),
    paper="Yuan et al. 2026, Behavior knowledge merge in reinforced agentic models",
    url="https://arxiv.org/abs/2601.13572",
    params=[epsilon],
    laws=("equal", "symmetric"),
)
def ram(xp: Any, x: tuple[Any, ...], *, epsilon: float) -> Any:
    """The mean of each entry's changes, over the models that changed it.

    With d_i the differences from the base and c_i = [|d_i| > epsilon], the result is
    base + sum_i c_i d_i / max(sum_i c_i, 1): what one model alone changed is kept at full size. ``epsilon`` is
    absolute: of models that moved by less than that everywhere nothing is merged, so lower it for slight fine-tunes.

    >>> import numpy as np
    >>> ram(np, (np.array([0.5, 0.0, 1e-6]), np.array([0.25, 0.125, 0.0])), epsilon=1e-5)
    array([0.375, 0.125, 0.   ])
    """
    total: Any = 0.0
    count: Any = TINY
    for delta in x:
        # A product leaves NaN to show in the result, where a choice would drop it.
        change = xp.asarray(xp.abs(delta) > epsilon, dtype=xp.float32)
        total = total + delta * change
        count = count + change
    return total / count
