"""DARE with TIES: drop entries of task vectors at random, rescale the rest, merge what agrees in sign."""

from __future__ import annotations

from mergekit.methods.rules import RandomKeep, SparseMerge, task_parameters
from mergekit.methods.spec import Sparse, method


@method(
    "dare_ties",
    title="DARE with TIES",
    form=Sparse(),
    base="required",
    models=(1, None),
    paper="Yu et al. 2023, Language models are super Mario: absorbing abilities from homologous models",
    url="https://arxiv.org/abs/2311.03099",
    params=task_parameters(normalize=False, rescale=True, consensus=True),
    laws=("equal", "zero", "dense", "deltas"),
)
def dare_ties(
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool,
    rescale: str,
    lambda_: float,
    elect: str = "weighted",
) -> SparseMerge:
    """Task vectors with entries dropped at random, rescaled, and merged where their signs agree.

    The random masks and the rescaling of ``dare_linear``, then the sign consensus of ``ties``.

    >>> dare_ties(weight=(1.0,), density=(0.5,), normalize=False, rescale="l1", lambda_=1.0).consensus
    True
    """
    return SparseMerge(
        keep=tuple(RandomKeep(d) for d in density),
        weight=weight,
        consensus=True,
        normalize=normalize,
        rescale=rescale,
        factor=lambda_,
        elect=elect,
    )
