"""DELLA: drop entries of task vectors at random, the smaller ones rather, rescale, merge what agrees in sign."""

from __future__ import annotations

from mergekit.methods.rules import RankKeep, SparseMerge, task_parameters
from mergekit.methods.spec import Real, Sparse, each, method

EPSILON = each(
    "epsilon", Real(0.0), 0.15, help="how far the probability of keeping an entry goes from density, by its rank"
)


@method(
    "della",
    title="DELLA",
    form=Sparse(),
    base="required",
    models=(1, None),
    paper="Deep et al. 2024, DELLA-Merging: reducing interference in model merging through magnitude-based sampling",
    url="https://arxiv.org/abs/2406.11617",
    params=task_parameters(normalize=True, rescale=True, consensus=True, more=(EPSILON,)),
    laws=("equal", "zero", "dense", "deltas"),
)
def della(
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    epsilon: tuple[float, ...],
    normalize: bool,
    rescale: str,
    lambda_: float,
    elect: str = "weighted",
) -> SparseMerge:
    """Task vectors with entries dropped at random by rank, rescaled, and merged where their signs agree.

    The masks and the rescaling of ``della_linear``, then the sign consensus of ``ties``.

    >>> della(
    ...     weight=(1.0,), density=(0.5,), epsilon=(0.15,), normalize=True, rescale="l1", lambda_=1.0
    ... ).consensus
    True
    """
    return SparseMerge(
        keep=tuple(RankKeep(d, e) for d, e in zip(density, epsilon, strict=True)),
        weight=weight,
        consensus=True,
        normalize=normalize,
        rescale=rescale,
        factor=lambda_,
        elect=elect,
    )
