"""CABS: prune task vectors in balanced groups, one after the other, so that no two keep the same place."""

from __future__ import annotations

from mergekit.methods.rules import GroupTop, SparseMerge
from mergekit.methods.spec import Integer, Real, Sparse, each, method, once


@method(
    "cabs",
    title="CABS",
    form=Sparse(),
    base="required",
    models=(1, None),
    paper="Yang et al. 2025, CABS: conflict-aware and balanced sparsification for enhancing model merging",
    url="https://arxiv.org/abs/2503.01874",
    params=[
        each("weight", Real(), help="coefficient of the model's task vector (the paper's lambda)"),
        each("n", Integer(0, 1 << 20), 64, help="entries to keep in each group"),
        once("m", Integer(1, 1 << 20), 256, help="entries of a group"),
        once("lambda", Real(), 1.0, help="factor on the merged task vector before the base is added"),
    ],
    laws=("equal", "zero", "deltas"),
)
def cabs(*, weight: tuple[float, ...], n: tuple[int, ...], m: int, lambda_: float) -> SparseMerge:
    """Task vectors pruned to disjoint, evenly spread entries, and added.

    In the order of the recipe, each model keeps the ``n`` entries of largest magnitude of each ``m`` that follow each
    other, among the places that no model before it keeps. Nothing is rescaled but by the weights. Where the models
    ask for more than a group has, the later ones get what is left. Unlike the authors' program, which drops a last
    group that is not full, such a group keeps its share, and at least one entry.

    >>> cabs(weight=(0.7, 0.5), n=(64, 64), m=256, lambda_=1.0).keep
    (GroupTop(n=64, m=256), GroupTop(n=64, m=256))
    """
    return SparseMerge(
        keep=tuple(GroupTop(count, m) for count in n),
        weight=weight,
        consensus=False,
        normalize=False,
        rescale="none",
        factor=lambda_,
    )
