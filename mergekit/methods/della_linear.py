"""DELLA without sign consensus: drop entries of task vectors at random, the smaller ones rather, rescale, add."""

from __future__ import annotations

from mergekit.methods.della import EPSILON
from mergekit.methods.rules import RankKeep, SparseMerge, task_parameters
from mergekit.methods.spec import Sparse, method


@method(
    "della_linear",
    title="DELLA with task arithmetic",
    form=Sparse(),
    base="required",
    models=(1, None),
    paper="Deep et al. 2024, DELLA-Merging: reducing interference in model merging through magnitude-based sampling",
    url="https://arxiv.org/abs/2406.11617",
    params=task_parameters(normalize=False, rescale=True, more=(EPSILON,)),
    laws=("equal", "zero", "dense", "deltas"),
)
def della_linear(
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    epsilon: tuple[float, ...],
    normalize: bool,
    rescale: str,
    lambda_: float,
) -> SparseMerge:
    """Task vectors with entries dropped at random by rank, rescaled, and added.

    In each row the entry of largest magnitude is kept with probability density + epsilon, the smallest with
    density - epsilon, the others in between by their rank; equal magnitudes share their mean rank. Rows are what
    lies behind one index of the first axis. ``rescale`` restores the L1 norm, as recipes for arcee mergekit expect;
    the paper divides each entry by its own probability (``rescale: density``).

    >>> della_linear(
    ...     weight=(1.0,), density=(0.5,), epsilon=(0.15,), normalize=False, rescale="l1", lambda_=1.0
    ... ).keep
    (RankKeep(density=0.5, epsilon=0.15),)
    """
    return SparseMerge(
        keep=tuple(RankKeep(d, e) for d, e in zip(density, epsilon, strict=True)),
        weight=weight,
        consensus=False,
        normalize=normalize,
        rescale=rescale,
        factor=lambda_,
    )
