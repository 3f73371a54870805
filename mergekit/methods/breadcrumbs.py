"""Model Breadcrumbs: drop the smallest and the very largest entries of task vectors, add what is left."""

from __future__ import annotations

from mergekit.methods.rules import MagnitudeBand, SparseMerge, task_parameters
from mergekit.methods.spec import Real, Sparse, each, method

GAMMA = each("gamma", Real(0.0), 0.01, help="fraction of the task vector's largest entries to drop as outliers")


@method(
    "breadcrumbs",
    title="Model Breadcrumbs",
    form=Sparse(),
    base="required",
    models=(1, None),
    paper="Davari & Belilovsky 2023, Model Breadcrumbs: scaling multi-task model merging with sparse masks",
    url="https://arxiv.org/abs/2312.06795",
    params=task_parameters(normalize=False, rescale=False, more=(GAMMA,)),
    laws=("equal", "zero", "dense", "symmetric", "deltas"),
)
def breadcrumbs(
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    gamma: tuple[float, ...],
    normalize: bool,
    rescale: str,
    lambda_: float,
) -> SparseMerge:
    """Task vectors without their largest and smallest entries, added.

    Of each task vector the ``gamma`` share of largest magnitude is dropped, the ``density`` share that follows is
    kept, exactly, and the rest is dropped. ``density`` wins where both ask for more than there is. As recipes for
    arcee mergekit expect, the shares are of the whole tensor; the paper writes beta for 1 - density - gamma.

    >>> breadcrumbs(
    ...     weight=(1.0,), density=(0.9,), gamma=(0.01,), normalize=False, rescale="none", lambda_=1.0
    ... ).keep
    (MagnitudeBand(density=0.9, gamma=0.01),)
    """
    return SparseMerge(
        keep=tuple(MagnitudeBand(d, g) for d, g in zip(density, gamma, strict=True)),
        weight=weight,
        consensus=False,
        normalize=normalize,
        rescale=rescale,
        factor=lambda_,
    )
