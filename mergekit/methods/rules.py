"""The named building blocks of the ``sparse`` form: keep rules, and how kept deltas are combined."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit.methods.spec import Choice, Flag, Parameter, ParameterError, Real, each, ignored, once

__all__ = [
    "GroupTop",
    "KeepAll",
    "KeepRule",
    "MagnitudeBand",
    "RandomKeep",
    "RankKeep",
    "SparseMerge",
    "TopMagnitude",
    "task_parameters",
]


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Keep every entry of the delta."""


@dataclass(frozen=True, slots=True)
class TopMagnitude:
    """Keep the ``max(1, floor(density * size))`` entries of largest magnitude, exactly; of ties, the first.

    ``density`` is the fraction kept: 1 or more keeps all, 0 or less none.
    """

    density: float


@dataclass(frozen=True, slots=True)
class MagnitudeBand:
    """Skip the entries of largest magnitude, keep those that follow (Model Breadcrumbs, arXiv 2312.06795).

    ``keep = floor(density * size)`` entries are kept, exactly. ``floor(gamma * size)`` are skipped before them, fewer
    if not enough would be left. Of equal magnitudes the one of lower index counts as the larger. A ``density`` of 1
    or more keeps all, 0 or less none.
    """

    density: float
    gamma: float

    def places(self, size: int) -> tuple[int, int]:
        """How many entries of ``size`` are skipped and how many are kept, from the largest downwards.

        >>> MagnitudeBand(0.5, 0.1).places(10)
        (1, 5)
        """
        kept = int(self.density * size)
        return min(int(self.gamma * size), size - kept), kept


@dataclass(frozen=True, slots=True)
class RandomKeep:
    """Keep each entry with probability ``density``, independently (DARE, arXiv 2311.03099)."""

    density: float


@dataclass(frozen=True, slots=True)
class RankKeep:
    """Keep each entry with a probability that grows with its rank in its row (DELLA, arXiv 2406.11617).

    The entry of rank r (0 for the smallest magnitude, m - 1 for the largest of the row's m; equal magnitudes share
    the mean of their ranks) is kept with probability density - epsilon + 2 epsilon r / (m - 1), independently. Rows
    are what lies behind one index of the first axis; a tensor with one axis is one row. In a row of one entry the
    probability is ``density``. A ``density`` of 1 or more keeps all, 0 or less none; others must leave all
    probabilities between 0 and 1, or ParameterError is raised.
    """

    density: float
    epsilon: float

    def __post_init__(self) -> None:
        """Hold the probabilities to what they must be."""
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if 0 < self.density < 1 and not 0 < min(low, high) <= max(low, high) < 1:
            raise ParameterError(
                f"density {self.density:g} with epsilon {self.epsilon:g} gives probabilities from {low:g} to {high:g}, "
                "which must lie between 0 and 1; choose a smaller epsilon"
            )


@dataclass(frozen=True, slots=True)
class GroupTop:
    """Keep the ``n`` entries of largest magnitude in each ``m`` that follow each other (CABS, arXiv 2503.01874).

    Only places that no model before this one keeps are open, so that the masks of such rules are disjoint; where
    fewer than n are open, all are kept. Of equal magnitudes the first are kept. A last group of g < m entries keeps
    ``max(1, floor(n * g / m))``. ParameterError if ``n`` exceeds ``m``.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Refuse what keeps more than there is."""
        if self.n > self.m:
            raise ParameterError(f"n is {self.n} and m is {self.m}: a group of {self.m} entries can't keep {self.n}")

    def of(self, length: int) -> int:
        """How many entries of a group of ``length`` are kept, if so many are open.

        >>> GroupTop(64, 256).of(10)
        2
        """
        return max(1, self.n * length // self.m) if self.n and length else 0


KeepRule = KeepAll | TopMagnitude | MagnitudeBand | RandomKeep | RankKeep | GroupTop


@dataclass(frozen=True, slots=True)
class SparseMerge:
    """base + factor * combine(weight_i * scale_i * keep_i(delta_i)).

    ``rescale`` is what scale_i makes good of what was dropped: ``none`` nothing (it is 1); ``l1`` brings the L1 norm of
    the kept entries back to that of the whole delta; ``density`` divides by the probability with which an entry was
    kept, or, where nothing is random, by the share kept.
    ``consensus``: count only entries whose sign is the elected one of their place. ``elect`` says which that is: the
    sign of the sum of the scaled kept entries, ``weighted`` or ``unweighted`` (zero sums count as positive); the sign
    of an entry is then that of the same product. ``normalize``: divide by the sum of the weights (of their
    magnitudes, of those that count, under consensus).
    """

    keep: tuple[KeepRule, ...]
    weight: tuple[float, ...]
    consensus: bool
    normalize: bool
    rescale: str
    factor: float
    elect: str = "weighted"

    def __post_init__(self) -> None:
        """Refuse rules that can't be followed in one walk through a tensor."""
        groups = {keep.m for keep in self.keep if isinstance(keep, GroupTop)}
        if len(groups) > 1 or (groups and any(isinstance(keep, RankKeep) for keep in self.keep)):
            raise ParameterError("the models of a merge can't mix groups of different sizes, nor groups and ranks")


def task_parameters(
    *, normalize: bool, rescale: bool, density: bool = True, consensus: bool = False, more: tuple[Parameter, ...] = ()
) -> list[Parameter]:
    """The parameters of the task-vector family, with the defaults in which its members differ.

    ``density``: whether entries are dropped at all; ``consensus``: whether signs are elected; ``more`` are the
    member's own parameters.
    """
    params = [
        each("weight", Real(), help="coefficient of the model's task vector"),
        each("density", Real(usual=(0, 1)), 1.0, help="fraction of the task vector's entries to keep"),
        *more,
        once(
            "normalize",
            Flag(),
            normalize,
            help="divide by the sum of the weights; where signs are elected, of the magnitudes of those that agree",
        ),
        once(
            "rescale",
            Choice(("none", "l1", "density"), flags=("none", "l1")),
            "l1" if rescale else "none",
            help="make good for dropped entries: l1 restores the task vector's L1 norm, density divides by the share "
            "or probability kept",
        ),
        once(
            "elect",
            Choice(("weighted", "unweighted")),
            "weighted",
            help="whether signs are elected from weighted task vectors or, as in the TIES paper, from unweighted ones",
        ),
        once("lambda", Real(), 1.0, help="factor on the merged task vector before the base is added"),
        ignored("int8_mask", Flag(), help="changes nothing: sign masks are never stored"),
    ]
    unused = [*([] if density else ["density", "rescale"]), *([] if consensus else ["elect"])]
    return [p for p in params if p.name not in unused]
