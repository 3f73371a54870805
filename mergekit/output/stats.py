"""merge_stats.json: the figures gathered while merging, for each tensor and for the whole model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.checkpoint import read_json
from mergekit.dtypes import F32
from mergekit.errors import CheckpointError
from mergekit.output.record import record_text
from mergekit.planning.expression import Apply
from mergekit.planning.plan import Plan

__all__ = [
    "LEAST_SURVIVAL",
    "STATS",
    "Statistics",
    "lost_to_rounding",
    "pooled",
    "read_summary",
    "statistics_of",
    "stats_text",
]

STATS = "merge_stats.json"
LEAST_SURVIVAL = 0.9
"""The share of a change below which rounding is worth a warning."""

_MOST = 1e100

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
    found = {"tensors": len(merged), **pooled(list(merged.values()))}
    for name in ("norms", "norm_ratio", "kept"):
        found.pop(name, None)
    if "change" not in found:
        del found["cosines"]
        return found
    found["deltas"] = {models[model]: length for model, length in found["deltas"].items()}
    found["cosines"] = {f"{models[a]}, {models[b]}": cosine for (a, b), cosine in found["cosines"].items()}
    return found


def pooled(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of some tensors taken as one vector; None where one of them is not finite.

    ``norms``, ``deltas`` and ``kept`` are by model, ``cosines`` by pair of models, as places in the list of models.
    What is about changes of a base is there if one of the tensors has it, and then says nothing of the others.
    """
    norms = {model: _length(lengths) for model, lengths in _lengths(tensors, "norms", 0).items()}
    total = _sum(list(norms.values()))
    result = _length(f["result"] for f in tensors)
    found: dict[str, Any] = {
        "elements": sum(f["elements"] for f in tensors),
        "result": result,
        "nonfinite": sum(f["nonfinite"] for f in tensors),
    }
    change = [f for f in tensors if "change" in f]
    if change:
        shared = [f["shared"] * f["elements"] for f in change]
        torn = sum(n * f["sign_conflict"] for n, f in zip(shared, change, strict=True))
        found["change"] = _length(f["change"] for f in change)
        found["sign_conflict"] = _share(torn, sum(shared), 0.0)
        squares = [_times(f["change"], f["change"]) for f in change]
        left = [_times(f["survival"], square) for f, square in zip(change, squares, strict=True)]
        found["survival"] = _share(_sum(left), _sum(squares), 1.0)
        found["deltas"] = {model: _length(lengths) for model, lengths in _lengths(change, "deltas", 1).items()}
    found["cosines"] = _cosines(change, "deltas", 1) if change else _cosines(tensors, "norms", 0)
    found["norms"] = norms
    found["norm_ratio"] = _share(result, None if total is None else total / max(len(norms), 1), 1.0)
    if kept := _kept(tensors):
        found["kept"] = kept
    return found


Lengths = dict[int, list[float | None]]


def _lengths(tensors: Sequence[Mapping[str, Any]], name: str, base: int) -> Lengths:
    """The lengths ``name`` of each model; ``base``: how many of a tensor's models come before those with one."""
    found: Lengths = {}
    for figures in tensors:
        for model, length in zip(figures["models"][base:], figures[name], strict=True):
            found.setdefault(model, []).append(length)
    return dict(sorted(found.items()))


def _cosines(tensors: Sequence[Mapping[str, Any]], name: str, base: int) -> dict[tuple[int, int], float | None]:
    """The cosine between each two models, whose lengths are ``name``, over all tensors."""
    squares = {model: _sum([_times(x, x) for x in lengths]) for model, lengths in _lengths(tensors, name, base).items()}
    products: dict[tuple[int, int], list[float | None]] = {}
    for figures in tensors:
        others = figures["models"][base:]
        pairs = itertools.combinations(range(len(others)), 2)
        for (a, b), cosine in zip(pairs, figures["cosines"], strict=True):
            pair = min(others[a], others[b]), max(others[a], others[b])
            part = _times(cosine, _times(figures[name][a], figures[name][b]))
            products.setdefault(pair, []).append(part)
    return {
        (a, b): _share(_sum(products[a, b]), _root(_times(squares[a], squares[b])), 0.0) for a, b in sorted(products)
    }


def _kept(tensors: Sequence[Mapping[str, Any]]) -> dict[int, float | None]:
    """The share of its entries that each model keeps, where a method drops some."""
    parts: dict[int, list[tuple[float, int]]] = {}
    for figures in tensors:
        for model, share in zip(figures["models"][1:], figures.get("kept", ()), strict=False):
            parts.setdefault(model, []).append((share, figures["elements"]))
    return {
        model: _share(sum(share * size for share, size in found), sum(size for _, size in found), 0.0)
        for model, found in sorted(parts.items())
    }


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
    lost = {name: share for name, share in survival.items() if share < LEAST_SURVIVAL}
    if not lost or plan.rounding != "nearest":
        return []
    worst = min(lost, key=lambda name: lost[name])
    dtype = short[worst]
    return [
        f"rounding to {dtype} ate more than a tenth of the change of {len(lost)} tensor(s) "
        f"({worst} keeps {lost[worst]:.0%}); 'rounding: stochastic' in the recipe keeps it on average, or use "
        f"dtype: float32"
    ]


@dataclass(frozen=True, slots=True)
class Statistics:
    """The contents of a merge_stats.json; ``tensors`` are its records as they are, checked."""

    method: str
    models: tuple[str, ...]
    copied: int
    unknown: tuple[str, ...]
    tensors: Mapping[str, Mapping[str, Any]]


def statistics_of(record: Mapping[str, Any], place: str) -> Statistics:
    """What the JSON of a merge_stats.json says; CheckpointError, naming ``place``, if it is not one of ours."""
    try:
        models = tuple(_is(str, name) for name in _is(list, record["models"]))
        tensors = _is(dict, record["tensors"])
        for figures in tensors.values():
            _check_figures(_is(dict, figures), len(models))
        unknown = tuple(_is(str, name) for name in _is(list, record["unknown"]))
        return Statistics(_is(str, record["method"]), models, _is(int, record["copied"]), unknown, tensors)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{place}: not statistics of mergekit ({error!s:.80}); make the model again") from None


def _check_figures(figures: Mapping[str, Any], models: int) -> None:
    """ValueError or KeyError unless a tensor's record has all figures, as many as its models ask for."""
    count = len(_is(list, figures["models"]))
    if not count or not all(0 <= _is(int, model) < models for model in figures["models"]):
        raise ValueError("a model that is not in the list")
    onto_base = "change" in figures
    others = count - onto_base
    sizes = {"norms": count, "cosines": others * (others - 1) // 2, **({"deltas": others} if onto_base else {})}
    for name, size in sizes.items():
        if len([_is_figure(value) for value in _is(list, figures[name])]) != size:
            raise ValueError(f"{name} of {size} expected")
    for name in ("result", "norm_ratio", *(("change", "survival") if onto_base else ())):
        _is_figure(figures[name])
    for value in (*(figures[name] for name in ("shared", "sign_conflict") if onto_base), *figures.get("kept", ())):
        _is_number((int, float), value)
    _is_number(int, figures["elements"])
    _is_number(int, figures["nonfinite"])


def _is_figure(value: Any) -> Any:
    return value if value is None else _is_number((int, float), value)


def _is_number(kind: Any, value: Any) -> Any:
    """Of a size that can be squared and summed, which what we measure always is."""
    if not abs(_is(kind, value)) <= _MOST:
        raise ValueError(f"{value!r:.60} is out of range")
    return value


def _is(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{value!r:.60} is out of place")
    return value
