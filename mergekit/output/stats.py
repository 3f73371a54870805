"""merge_stats.json: the figures gathered while merging, for each tensor and for the whole model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.checkpoint import read_json
from mergekit.dtypes import F32
from mergekit.errors import CheckpointError
from mergekit.output.record import record_text
from mergekit.planning.expression import Apply
from mergekit.planning.plan import Plan

__all__ = ["STATS", "lost_to_rounding", "read_summary", "stats_text"]

STATS = "merge_stats.json"
_LEAST_SURVIVAL = 0.9

Figures = Mapping[str, Mapping[str, Any]]


def stats_text(plan: Plan, figures: Figures) -> str:
    """The file's text. Tensors come in the order of the plan; copied ones have no figures.

    ``unknown`` are tensors that a run with --no-stats had merged before this one went on.
    ``models`` of a tensor are places in the list of models, in the order of its other lists (a base comes first).
    """
    merged = {
        output.name: {"models": list(output.expression.models), **figures[output.name]}
        for output in plan.outputs
        if output.name in figures and isinstance(output.expression, Apply)
    }
    models = [source.short for source in plan.sources if not source.prepared and not source.adapter]
    document = {
        "mergekit": plan.version,
        "method": plan.method,
        "models": models,
        "rounding": plan.rounding,
        "copied": sum(not isinstance(output.expression, Apply) for output in plan.outputs),
        "unknown": [o.name for o in plan.outputs if isinstance(o.expression, Apply) and o.name not in merged],
        "summary": _summary(models, merged),
        "tensors": merged,
    }
    return record_text(document)


def read_summary(folder: Path) -> Mapping[str, Any]:
    """The summary in the merge_stats.json of a model folder; empty without one. CheckpointError if it is damaged."""
    path = folder / STATS
    summary = read_json(path).get("summary") if path.is_file() else {}
    if not isinstance(summary, dict):
        raise CheckpointError(f"{path}: not statistics of mergekit; make the model again")
    return summary


def _summary(models: Sequence[str], merged: Figures) -> dict[str, Any]:
    """The figures of all merged tensors taken as one vector; None where one of them is not finite."""
    all_figures = list(merged.values())
    found: dict[str, Any] = {
        "tensors": len(merged),
        "elements": sum(f["elements"] for f in all_figures),
        "result": _length(f["result"] for f in all_figures),
        "nonfinite": sum(f["nonfinite"] for f in all_figures),
    }
    change = [f for f in all_figures if "change" in f]
    if change:
        shared = [f["shared"] * f["elements"] for f in change]
        torn = sum(n * f["sign_conflict"] for n, f in zip(shared, change, strict=True))
        found["change"] = _length(f["change"] for f in change)
        found["sign_conflict"] = _share(torn, sum(shared), 0.0)
        squares = [None if f["change"] is None else f["change"] ** 2 for f in change]
        left = [_times(f["survival"], square) for f, square in zip(change, squares, strict=True)]
        found["survival"] = _share(_sum(left), _sum(squares), 1.0)
        found["deltas"], found["cosines"] = _between(models, change)
    return found


def _between(
    models: Sequence[str], change: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Each model's distance from the base, and the cosine between each two models' deltas, over all tensors."""
    lengths: dict[int, list[float | None]] = {}
    products: dict[tuple[int, int], list[float | None]] = {}
    for figures in change:
        others = figures["models"][1:]
        for model, length in zip(others, figures["deltas"], strict=True):
            lengths.setdefault(model, []).append(length)
        pairs = itertools.combinations(range(len(others)), 2)
        for (a, b), cosine in zip(pairs, figures["cosines"], strict=True):
            pair = min(others[a], others[b]), max(others[a], others[b])
            part = _times(cosine, _times(figures["deltas"][a], figures["deltas"][b]))
            products.setdefault(pair, []).append(part)
    squares = {model: _sum([_times(x, x) for x in found]) for model, found in lengths.items()}
    deltas = {models[model]: _length(lengths[model]) for model in sorted(lengths)}
    cosines = {
        f"{models[a]}, {models[b]}": _share(_sum(products[a, b]), _root(_times(squares[a], squares[b])), 0.0)
        for a, b in sorted(products)
    }
    return deltas, cosines


def _times(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _root(value: float | None) -> float | None:
    return None if value is None else math.sqrt(value)


def _share(part: float | None, whole: float | None, otherwise: float) -> float | None:
    if part is None or whole is None:
        return None
    return _short(part / whole) if whole else otherwise


def _length(lengths: Iterable[float | None]) -> float | None:
    total = _root(_sum([_times(length, length) for length in lengths]))
    return None if total is None else _short(total)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def lost_to_rounding(plan: Plan, figures: Figures) -> Sequence[str]:
    """A warning if rounding to the nearest number ate more than a tenth of the change of some tensors."""
    short = {o.name: o.dtype.name for o in plan.outputs if o.dtype.size < F32.size}
    survival = {n: f["survival"] for n, f in figures.items() if n in short and f.get("survival") is not None}
    lost = {name: share for name, share in survival.items() if share < _LEAST_SURVIVAL}
    if not lost or plan.rounding != "nearest":
        return []
    worst = min(lost, key=lambda name: lost[name])
    dtype = short[worst]
    return [
        f"rounding to {dtype} ate more than a tenth of the change of {len(lost)} tensor(s) "
        f"({worst} keeps {lost[worst]:.0%}); 'rounding: stochastic' in the recipe keeps it on average, or use "
        f"dtype: float32"
    ]
