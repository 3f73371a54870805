"""DARE without sign consensus: drop entries of task vectors at random, rescale the rest, add."""

from __future__ import annotations

from mergekit.methods.rules import RandomKeep, SparseMerge, task_parameters
from mergekit.methods.spec import Sparse, method


@method(
    "dare_linear",
    title="DARE with task arithmetic",
    form=Sparse(),
    base="required",
    models=(1, None),
    paper="Yu et al. 2023, Language models are super Mario: absorbing abilities from homologous models",
    url="https://arxiv.org/abs/2311.03099",
    params=task_parameters(normalize=False, rescale=True),
    laws=("equal", "zero", "dense", "deltas"),
)
def dare_linear(
    *, weight: tuple[float, ...], density: tuple[float, ...], normalize: bool, rescale: str, lambda_: float
) -> SparseMerge:
    """Task vectors with entries dropped at random, rescaled, and added.

    Each entry is kept with probability ``density``; the masks depend on the recipe's seed, the tensor's name and the
    model's position only. ``rescale`` restores the L1 norm of the task vector, as recipes for arcee mergekit
    expect; the paper divides by the density (``rescale: density``), which is the same on average.

    >>> dare_linear(weight=(1.0,), density=(0.5,), normalize=False, rescale="l1", lambda_=1.0).keep
    (RandomKeep(density=0.5),)
    """
    return SparseMerge(
        keep=tuple(RandomKeep(d) for d in density),
        weight=weight,
        consensus=False,
        normalize=normalize,
        rescale=rescale,
        factor=lambda_,
    )
