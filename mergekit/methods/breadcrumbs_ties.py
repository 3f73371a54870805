"""Model Breadcrumbs with TIES: drop the smallest and the very largest entries, merge what agrees in sign."""

from __future__ import annotations

from mergekit.methods.breadcrumbs import GAMMA
from mergekit.methods.rules import MagnitudeBand, SparseMerge, task_parameters
from mergekit.methods.spec import Sparse, method


@method(
    "breadcrumbs_ties",
    title="Model Breadcrumbs with TIES",
    form=Sparse(),
    base="required",
    models=(1, None),
    paper="Davari & Belilovsky 2023, Model Breadcrumbs: scaling multi-task model merging with sparse masks",
    url="https://arxiv.org/abs/2312.06795",
    params=task_parameters(normalize=False, rescale=False, consensus=True, more=(GAMMA,)),
    laws=("equal", "zero", "dense", "symmetric", "deltas"),
)
def breadcrumbs_ties(
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    gamma: tuple[float, ...],
    normalize: bool,
    rescale: str,
    lambda_: float,
    elect: str = "weighted",
) -> SparseMerge:
    """Task vectors without their largest and smallest entries, merged where their signs agree.

    The masks of ``breadcrumbs``, then the sign consensus of ``ties``.

    >>> breadcrumbs_ties(
    ...     weight=(1.0,), density=(0.9,), gamma=(0.01,), normalize=False, rescale="none", lambda_=1.0
    ... ).consensus
    True
    """
    return SparseMerge(
        keep=tuple(MagnitudeBand(d, g) for d, g in zip(density, gamma, strict=True)),
        weight=weight,
        consensus=True,
        normalize=normalize,
        rescale=rescale,
        factor=lambda_,
        elect=elect,
    )
