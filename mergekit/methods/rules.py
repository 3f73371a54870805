"""The named building blocks of the ``sparse`` form: keep rules, and how kept deltas are combined."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit.methods.spec import Flag, Parameter, Real, each, ignored, once

__all__ = ["KeepAll", "RandomKeep", "SparseMerge", "TopMagnitude", "task_parameters"]


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
class RandomKeep:
    """Keep each entry with probability ``density``, independently (DARE, arXiv 2311.03099)."""

    density: float


@dataclass(frozen=True, slots=True)
class SparseMerge:
    """base + factor * combine(weight_i * scale_i * keep_i(delta_i)).

    ``rescale``: scale_i brings the L1 norm of the kept entries back to that of the whole delta (else it is 1).
    ``consensus``: count only entries whose sign is that of the weighted sum at their place (zero sums count as
    positive). ``normalize``: divide by the sum of the weights (of their magnitudes, of those that count, under
    consensus).
    """

    keep: tuple[KeepAll | TopMagnitude | RandomKeep, ...]
    weight: tuple[float, ...]
    consensus: bool
    normalize: bool
    rescale: bool
    factor: float


def task_parameters(*, normalize: bool, rescale: bool, density: bool = True) -> list[Parameter]:
    """The parameters of the task-vector family, with the defaults in which its members differ."""
    params = [
        each("weight", Real(), help="coefficient of the model's task vector"),
        each("density", Real(), 1.0, help="fraction of the task vector's entries to keep"),
        once("normalize", Flag(), normalize, help="divide by the sum of the weights"),
        once("rescale", Flag(), rescale, help="restore the L1 norm of a task vector after dropping entries"),
        once("lambda", Real(), 1.0, help="factor on the merged task vector before the base is added"),
        ignored("int8_mask", Flag(), help="changes nothing: sign masks are never stored"),
    ]
    return [p for p in params if density or p.name not in ("density", "rescale")]
