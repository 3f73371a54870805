"""Say where each value of a merge comes from."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.api.merge import load_methods, plan_options
from mergekit.api.options import RunOptions
from mergekit.errors import UsageError

if TYPE_CHECKING:
    from mergekit.planning.explain import Explanation

__all__ = ["explain", "matching"]


def explain(recipe: str | Path | Mapping[str, Any], options: RunOptions | None = None) -> Explanation:
    """Which value each parameter of ``recipe`` takes for which tensor, and from which line; not a weight is read.

    Raises a MergekitError for what can't be planned.
    """
    from mergekit.planning.explain import explain_plan
    from mergekit.recipe import load_recipe

    options = options or RunOptions()
    load_methods(options)
    return explain_plan(load_recipe(recipe), plan_options(options, fetch=False))


def matching(explanation: Explanation, text: str) -> list[str]:
    """The output tensors called ``text``, or else those whose names hold it; UsageError if there are none."""
    names = [output.name for output in explanation.plan.outputs]
    found = [text] if text in names else [name for name in names if text in name]
    if not found:
        parts = {part for name in names for part in name.split(".") if not part.isdecimal()}
        near = [like for known in (names[:1000], parts) if (like := get_close_matches(text, known, 1))]
        hint = f"Did you mean '{near[0][0]}'?" if near else ""
        raise UsageError(f"the result has no tensor '{text}'. {hint or 'Without --tensor all are listed.'}")
    return found
