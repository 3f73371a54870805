"""DARE: drop entries of task vectors at random and rescale the rest; with or without sign consensus."""

from __future__ import annotations

from mergekit.methods.rules import RandomKeep, SparseMerge, task_parameters
from mergekit.methods.spec import Sparse, method

_PAPER = "Yu et al. 2023, Language models are super Mario: absorbing abilities from homologous models"
_URL = "https://arxiv.org/abs/2311.03099"


@method(
    "dare_ties",
    title="DARE with TIES",
    form=Sparse(),
    base="required",
    models=(1, None),
    paper=_PAPER,
    url=_URL,
    params=task_parameters(normalize=False, rescale=True),
)
def dare_ties(
    *, weight: tuple[float, ...], density: tuple[float, ...], normalize: bool, rescale: bool, lambda_: float
) -> SparseMerge:
    """Task vectors with entries dropped at random, rescaled, and merged where their signs agree.

    Each entry is kept with probability ``density``; the masks depend on the recipe's seed, the tensor's name and the
    model's position only. ``rescale`` restores the L1 norm of the task vector, as recipes for arcee mergekit
    expect; the paper divides by the density, which is the same on average.

    >>> dare_ties(weight=(1.0,), density=(0.5,), normalize=False, rescale=True, lambda_=1.0).keep
    (RandomKeep(density=0.5),)
    """
    return _dare(weight, density, normalize, rescale, lambda_, consensus=True)


@method(
    "dare_linear",
    title="DARE with task arithmetic",
    form=Sparse(),
    base="required",
    models=(1, None),
    paper=_PAPER,
    url=_URL,
    params=task_parameters(normalize=False, rescale=True),
)
def dare_linear(
    *, weight: tuple[float, ...], density: tuple[float, ...], normalize: bool, rescale: bool, lambda_: float
) -> SparseMerge:
    """Task vectors with entries dropped at random, rescaled, and added.

    As ``dare_ties`` without the sign consensus.

    >>> dare_linear(weight=(1.0,), density=(0.5,), normalize=False, rescale=True, lambda_=1.0).consensus
    False
    """
    return _dare(weight, density, normalize, rescale, lambda_, consensus=False)


def _dare(
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool,
    rescale: bool,
    factor: float,
    *,
    consensus: bool,
) -> SparseMerge:
    return SparseMerge(tuple(RandomKeep(d) for d in density), weight, consensus, normalize, rescale, factor)
