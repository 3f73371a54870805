"""RAM+, tensor by tensor: RAM with amplified changes of single models."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit.methods.ram import TINY
from mergekit.methods.ram import epsilon as epsilon_parameter
from mergekit.methods.spec import Elementwise, Real, method, once


def _counts(xp: Any, x: tuple[Any, ...], *, epsilon: float, r: float, alpha: float) -> Any:
    """For each model the entries that others changed too, then for each those that it alone changed."""
    changes = [xp.abs(delta) > epsilon for delta in x]
    by_any, by_several = changes[0], changes[0] & ~changes[0]
    for change in changes[1:]:
        by_several = by_several | (by_any & change)
        by_any = by_any | change
    by_one = by_any & ~by_several
    return xp.stack([xp.count_nonzero(change & part) for part in (by_several, by_one) for change in changes])


@method(
    "ramplus_tl",
    title="Reinforced Agent Merging Plus (RAM+, tensor-local)",
    form=Elementwise(measure=_counts),
    base="required",
    models=(1, None),
    paper="Yuan et al. 2026, Behavior knowledge merge in reinforced agentic models",
    url="https://arxiv.org/abs/2601.13572",
    params=[
        epsilon_parameter,
        once("r", Real(), 0.1, help="how much entries that one model alone changed grow with its share of shared ones"),
        once("alpha", Real(), 0.2, help="the most that the ratio of shared to unique entries counts"),
    ],
    laws=("equal", "symmetric"),
)
def ramplus_tl(xp: Any, x: tuple[Any, ...], sums: np.ndarray, *, epsilon: float, r: float, alpha: float) -> Any:
    """RAM whose unique changes are amplified, for models that share many of their changes with others.

    As in RAM, an entry that several models changed (|d_i| > epsilon) moves by the mean of their changes. One that
    model i alone changed moves by lambda_i d_i, where lambda_i = 1 + r clip(shared_i / max(unique_i, epsilon), 0,
    alpha); shared_i and unique_i count the entries of this tensor that model i changed together with others, and alone.
    ``sums`` are the shared counts of all models, then the unique ones.

    >>> import numpy as np
    >>> x = (np.array([0.5, 0.0, 1.0]), np.array([0.25, 0.125, 0.0]))
    >>> ramplus_tl(np, x, np.array([1.0, 1.0, 1.0, 1.0]), epsilon=1e-5, r=0.1, alpha=0.2)
    array([0.375 , 0.1275, 1.02  ])
    """
    shared, unique = sums[: len(x)].tolist(), sums[len(x) :].tolist()
    mean: Any = 0.0
    extra: Any = 0.0
    count: Any = TINY
    for delta, s, u in zip(x, shared, unique, strict=True):
        change = xp.asarray(xp.abs(delta) > epsilon, dtype=xp.float32)
        moved = delta * change
        mean = mean + moved
        extra = extra + moved * (r * max(0.0, min(s / max(u, epsilon, TINY), alpha)))
        count = count + change
    is_unique = xp.asarray(count < 2, dtype=xp.float32)
    return mean / count + extra * is_unique
