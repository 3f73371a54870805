"""merge_stats.json: the figures gathered while merging, for each tensor and for the whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit.planning.plan import Apply, Plan

__all__ = ["STATS", "lost_to_rounding", "stats_text"]

STATS = "merge_stats.json"
_LEAST_SURVIVAL = 0.9

Figures = Mapping[str, Mapping[str, Any]]


def stats_text(plan: Plan, figures: Figures) -> str:
    """The file's text. Tensors come in the order of the plan; copied ones have no figures."""
    merged = {output.name: figures[output.name] for output in plan.outputs if output.name in figures}
    document = {
        "mergekit": plan.version,
        "method": plan.method,
        "models": [source.short for source in plan.sources if not source.prepared],
        "rounding": plan.rounding,
        "copied": len(plan.outputs) - len(merged),
        "summary": _summary(plan, merged),
        "inputs": {o.name: list(o.expression.models) for o in plan.outputs
                   if o.name in merged and isinstance(o.expression, Apply)},
        "tensors": merged,
    }  # fmt: skip
    # One line a tensor: readable, and a fifth of the size of an indented file.
    parts = [f"{json.dumps(key)}: {_block(value)}" for key, value in document.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _block(value: Any) -> str:
    if isinstance(value, dict) and value and all(isinstance(v, (dict, list)) for v in value.values()):
        return "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"
    return json.dumps(value)


def _summary(plan: Plan, merged: Figures) -> dict[str, Any]:
    """The figures of all merged tensors taken as one vector; shares are weighted by elements."""
    change = [f for f in merged.values() if "change" in f]
    found: dict[str, Any] = {"tensors": len(merged), "elements": sum(f["elements"] for f in merged.values())}
    if merged:
        found["result"] = _length(f["result"] for f in merged.values())
        found["nonfinite"] = sum(f["nonfinite"] for f in merged.values())
    if change:
        elements = sum(f["elements"] for f in change)
        squares = sum(f["change"] ** 2 for f in change)
        found["change"] = _length(f["change"] for f in change)
        found["sign_conflict"] = sum(f["sign_conflict"] * f["elements"] for f in change) / max(elements, 1)
        found["survival"] = sum(f["survival"] * f["change"] ** 2 for f in change) / squares if squares else 1.0
    return found


def _length(lengths: Any) -> float:
    return math.sqrt(sum(length**2 for length in lengths))


def lost_to_rounding(plan: Plan, figures: Figures) -> Sequence[str]:
    """A warning if rounding to the nearest number ate more than a tenth of the change of some tensors."""
    lost = {n: f["survival"] for n, f in figures.items() if f.get("survival", 1.0) < _LEAST_SURVIVAL}
    if not lost or plan.rounding != "nearest":
        return []
    worst = min(lost, key=lambda name: lost[name])
    dtype = next(o.dtype.name for o in plan.outputs if o.name == worst)
    return [
        f"rounding to {dtype} ate more than a tenth of the change of {len(lost)} tensor(s) "
        f"({worst} keeps {lost[worst]:.0%}); 'rounding: stochastic' in the recipe keeps it on average, or use "
        f"dtype: float32"
    ]
