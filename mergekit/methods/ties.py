"""TIES: trim task vectors, elect a sign, merge what agrees."""

from __future__ import annotations

from mergekit.methods.rules import SparseMerge, TopMagnitude, task_parameters
from mergekit.methods.spec import Sparse, method


@method(
    "ties",
    title="TIES",
    form=Sparse(),
    base="required",
    models=(1, None),
    paper="Yadav et al. 2023, TIES-merging: resolving interference when merging models",
    url="https://arxiv.org/abs/2306.01708",
    params=task_parameters(normalize=True, rescale=False, consensus=True),
    laws=("equal", "zero", "dense", "symmetric", "deltas"),
)
def ties(
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool,
    rescale: str,
    lambda_: float,
    elect: str = "weighted",
) -> SparseMerge:
    """Task vectors trimmed to their largest entries and merged where their signs agree.

    Trim: keep the ``density`` share of largest magnitude of each task vector, exactly. Elect: at each place the sign
    of the weighted sum. Merge: the weighted mean of the entries of that sign (their sum without ``normalize``). With
    d_i the trimmed task vectors, s = sign(sum_i w_i d_i) and A the models whose w_i d_i has that sign, the result is
    base + lambda * sum_A w_i d_i / sum_A |w_i|, entry by entry.
    The sign is elected from weighted entries, as recipes for arcee mergekit expect; the paper has no weights
    (``elect: unweighted``).

    >>> ties(weight=(1.0,), density=(0.2,), normalize=True, rescale="none", lambda_=1.0).consensus
    True
    """
    return SparseMerge(
        keep=tuple(TopMagnitude(d) for d in density),
        weight=weight,
        consensus=True,
        normalize=normalize,
        rescale=rescale,
        factor=lambda_,
        elect=elect,
    )
