"""What a comparison means in plain words, and what to try: rules of thumb, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mergekit.api.comparison import Comparison, Figures

__all__ = ["Advice", "advise", "percent", "reading"]

_KIN, _STRANGERS = 0.9, 0.3
"""Cosines of weights: fine-tunes lie above the first (they move by a few per cent), unrelated models near zero."""
_ALIKE, _APART = 0.6, 0.15
"""Cosines of deltas: above the first most of what was learnt is the same, below the second nearly nothing is."""
_ROUNDING = 0.002
"""Rounding to bfloat16 moves weights by 2^-9 of themselves at most, by about half of that on average."""
_UNEVEN = 1.3
"""Roles or layers that moved so many times as far as the whole stand out."""
_LONGER = 3.0
_SIBLINGS = 0.5
"""The cosine of b - a and c - a, if a, b and c went equally far in independent directions."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A merge to try: ``method`` (None: none of them), the weight of each model but the first, and the reasons."""

    method: str | None
    weights: tuple[float, ...]
    reasons: tuple[str, ...]


def percent(value: float | None) -> str:
    """A share for people, three digits.

    >>> percent(0.0312), percent(None)
    ('3.12 %', '-')
    """
    return "-" if value is None else f"{value * 100:.3g} %"


def reading(comparison: Comparison) -> list[str]:
    """The figures in sentences: who is related to the first model, what moved, and how the changes agree.

    Of models without a common base only the first is told: what each of them learnt can't be seen from another one.
    """
    lines = [_kinship(comparison, model) for model in comparison.others]
    if not comparison.common_base:
        return lines
    kin = relatives(comparison)
    for model in kin:
        lines += _places(comparison, model)
    for a, b in comparison.pairs:
        if a in kin and b in kin and comparison.matrices.cosine(a, b) is not None:
            lines.append(_agreement(comparison, a, b))
    return lines


def relatives(comparison: Comparison) -> list[int]:
    """The positions of the models that changed something, and that lie near the first."""
    figures, total = comparison.matrices, comparison.total
    return [m for m in comparison.others if total.changed(m) and (figures.similarity(m) or 0) >= _KIN]


def _is_equal(comparison: Comparison, model: int) -> bool:
    return not comparison.total.changed(model) and comparison.total.is_finite(model)


def _kinship(comparison: Comparison, model: int) -> str:
    first, name = comparison.models[0], comparison.models[model]
    figures = comparison.matrices
    similarity, moved = figures.similarity(model), figures.moved(model)
    if _is_equal(comparison, model):
        return f"{name} has the weights of {first}{', as far as they were compared' if comparison.remarks else ''}."
    if not figures.is_finite(model):
        return f"{name} or {first} holds NaN or infinity, so the figures tell nothing."
    if similarity is None or moved is None:
        return f"{name} or {first} is all zeros, so the figures tell nothing."
    if not figures.changed(model):
        return f"{name} has the matrices of {first}; what differs are norms, biases or single numbers."
    if moved < _ROUNDING and similarity >= _KIN:
        return f"{name} differs from {first} by {percent(moved)}, which is what storing weights as bfloat16 may do."
    if similarity >= _KIN:
        return f"{name} is related to {first}: it differs by {percent(moved)} (cosine of the weights {similarity:.3f})."
    if similarity < _STRANGERS:
        return (
            f"{name} and {first} were trained independently (cosine of the weights {similarity:.3f}): averages and "
            f"task vectors of them give noise."
        )
    return (
        f"{name} is far from {first} (cosine {similarity:.3f}, moved by {percent(moved)}): long training apart. Merges "
        f"may lose much."
    )


def _places(comparison: Comparison, model: int) -> Iterator[str]:
    """Where a model moved more than elsewhere, and where not at all."""
    name, whole = comparison.models[model], comparison.matrices.moved(model) or 0.0
    found = {role: figures.moved(model) for role, figures in comparison.by_role().items()}
    roles = {role: moved for role, moved in found.items() if moved is not None}  # others it has not
    far = {role: moved for role, moved in roles.items() if moved > _UNEVEN * whole}
    still = [role for role, moved in roles.items() if moved == 0]
    if far:
        listed = ", ".join(f"{role} ({percent(moved)})" for role, moved in sorted(far.items(), key=lambda i: -i[1])[:3])
        yield f"{name} moved most, for their size, in {listed}."
    if still:
        yield f"{name} left alone: {', '.join(still)}."
    changed = comparison.matrices.changed(model) or 0.0
    if 0 < changed < 0.5:
        yield f"{name} changed only {percent(changed)} of the entries of its matrices."
    thirds = _thirds(comparison, model)
    if thirds is not None:
        yield f"{name} moved {thirds}."


def _thirds(comparison: Comparison, model: int) -> str | None:
    """How the last third of the layers compares with the first, if they differ."""
    moved = [moved for f in comparison.by_layer().values() if (moved := f.moved(model)) is not None]
    size = len(moved) // 3
    if not size:
        return None
    early, late = sum(moved[:size]) / size, sum(moved[-size:]) / size
    if late > _UNEVEN * early:
        return f"more in late layers ({percent(late)}) than in early ones ({percent(early)})"
    if early > _UNEVEN * late:
        return f"more in early layers ({percent(early)}) than in late ones ({percent(late)})"
    return None


def _agreement(comparison: Comparison, a: int, b: int) -> str:
    figures = comparison.matrices
    cosine, conflict = figures.cosine(a, b), figures.conflict(a, b)
    assert cosine is not None
    if cosine >= _ALIKE:
        what = "learnt much the same: averaging loses little, and adding counts it twice"
    elif cosine > _APART:
        what = "share a part of what they learnt: added in full, that part counts twice"
    elif cosine >= -_APART:
        what = "changed independently: their changes can be added and hardly disturb each other"
    else:
        what = "pull in opposite directions: what one gains, a merge with the other loses"
    torn = (
        f"; of the entries that both change {percent(conflict)} go opposite ways, where chance gives 50 %"
        if conflict is not None
        else ""
    )
    return f"{comparison.models[a]} and {comparison.models[b]} {what} (cosine of the changes {cosine:.2f}{torn})."


def advise(comparison: Comparison) -> Advice:
    """The merge that the figures suggest; measure it against its parts.

    The weights make the merged change as long as the models' own are on average: with n models whose changes have a
    mean cosine c, 1 / sqrt(n + n (n - 1) c) of each.
    """
    kin, figures = relatives(comparison), comparison.matrices
    first = comparison.models[0]
    broken = [m for m in comparison.others if figures.similarity(m) is None and not _is_equal(comparison, m)]
    if broken:
        names = " and ".join(comparison.models[m] for m in broken)
        why = f"{names} can't be compared with {first}: numbers that are not finite, or only zeros"
        return Advice(None, (), (why,))
    strangers = [m for m in comparison.others if (figures.similarity(m) or 0) < _KIN and figures.changed(m)]
    if strangers:
        names = " and ".join(comparison.models[m] for m in strangers)
        apart = f"{names}: too far from {first} for any method that combines weights"
        return Advice(None, (), (apart, "use them side by side: neither weights nor layers of unrelated models fit"))
    if not kin:
        return Advice(None, (), ("what was compared is the same in all models: there is nothing to merge",))
    if len(kin) == 1:
        name = comparison.models[kin[0]]
        reason = f"between {first} and {name} only t has to be chosen: how much of {name} to take"
        return Advice("slerp", (0.5,), (reason,))
    if not comparison.common_base:
        reason = "the models are related, and without their common ancestor the average is the safe choice"
        return Advice("linear", (1.0,) * len(comparison.models), (reason,))
    return _several(comparison, kin, figures)


def _several(comparison: Comparison, kin: list[int], figures: Figures) -> Advice:
    pairs = [(a, b) for a, b in comparison.pairs if a in kin and b in kin]
    n, mean = len(kin), sum(figures.cosine(a, b) or 0.0 for a, b in pairs) / len(pairs)
    square = n + n * (n - 1) * mean  # of the sum of n changes of length one
    if mean >= _ALIKE:
        method, weight = "linear", 1.0
        reasons = ["the models learnt much the same, so their average keeps it"]
    elif mean < -_APART:
        method, weight = "ties", 1.0
        reasons = ["the changes pull in opposite directions, and 'ties' lets the stronger side win in each entry; what "
                   "the other side learnt there is lost, which only a mixture of experts avoids"]  # fmt: skip
    else:
        method, weight = "task_arithmetic", min(1.0, 1 / math.sqrt(max(square, 1.0)))
        reasons = [f"with weight {weight:.2f} each, the merged change is as long as the models' own (their changes "
                   f"have a mean cosine of {mean:.2f})",
                   "if skills get lost, try 'ties' or 'dare_ties', which drop entries that conflict"]  # fmt: skip
    if abs(mean - _SIBLINGS) < 0.1:
        reasons.append(f"models of one ancestor have cosines near {_SIBLINGS} when seen from one of them: all this "
                       f"holds only if {comparison.models[0]} is what the others were made from")  # fmt: skip
    lengths = [figures.moved(m) or 0.0 for m in kin]
    if max(lengths) > _LONGER * min(lengths):
        longest = comparison.models[kin[lengths.index(max(lengths))]]
        reasons.append(f"{longest} moved {max(lengths) / min(lengths):.1f} times as far as another and will drown it; "
                       f"raise the other's weight, or use 'weighting: nan'")  # fmt: skip
    weights = tuple(round(weight, 2) if m in kin else 0.0 for m in comparison.others)
    return Advice(method, weights, tuple(reasons))
