"""Parameter settings: scalars, gradients over depth, and filters by tensor name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.methods.kinds import Integer, Kind

__all__ = ["Scalar", "evaluate_setting", "first_match", "interpolate", "setting_fault"]

Scalar = bool | int | float | str


@dataclass(frozen=True, slots=True)
class _Unset:
    """What a setting yields where none of its filters matches, or where its list is empty."""


UNSET = _Unset()


def setting_fault(value: object, path: tuple[str | int, ...] = ()) -> tuple[tuple[str | int, ...], str] | None:
    """What is wrong with the form of a setting, and at which path inside it; None if it is well formed.

    A setting is a scalar, a list of scalars (a gradient), a mapping ``{value, filter}``, or a list of such mappings.
    """
    if isinstance(value, dict):
        for key in value:
            if key not in ("value", "filter"):
                return (*path, key), f"a conditional value has no key '{key}'; it has 'value' and 'filter'"
        if "value" not in value:
            return path, "a conditional value needs the key 'value'"
        pattern = value.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            return (*path, "filter"), "a filter is text: part of a tensor's name"
        inner = value["value"]
        if isinstance(inner, dict) or (isinstance(inner, list) and any(isinstance(v, (dict, list)) for v in inner)):
            return (*path, "value"), "a conditional value holds a scalar or a list of scalars"
        return setting_fault(inner, (*path, "value"))
    if isinstance(value, list):
        mappings = [isinstance(v, dict) for v in value]
        if any(mappings) and not all(mappings):
            index = mappings.index(False)
            return (*path, index), "a list holds either scalars (a gradient) or {value, filter} mappings, not both"
        for index, item in enumerate(value):
            if isinstance(item, list):
                return (*path, index), "a gradient is a list of scalars, not of lists"
            fault = setting_fault(item, (*path, index))
            if fault:
                return fault
        return None
    if isinstance(value, (bool, int, float, str)):
        return None
    return path, f"expected a number, text, true or false, a list or {{value, filter}}, got {_name(value)}"


def _name(value: object) -> str:
    return "nothing (null)" if value is None else type(value).__name__


def first_match(setting: Any, tensor_name: str) -> tuple[Any, tuple[str | int, ...]]:
    """The value that applies to ``tensor_name``, and its path inside the setting; UNSET if no filter matches.

    Filters are plain, case-sensitive parts of the name; none, ``*`` and the empty text match everything.
    """
    entries: list[tuple[Any, tuple[str | int, ...]]]
    if isinstance(setting, dict):
        entries = [(setting, ())]
    elif isinstance(setting, list) and setting and isinstance(setting[0], dict):
        entries = [(entry, (index,)) for index, entry in enumerate(setting)]
    else:
        return setting, ()
    for entry, path in entries:
        pattern = entry.get("filter")
        if pattern is None or pattern == "*" or pattern in tensor_name:
            return entry["value"], (*path, "value")
    return UNSET, ()


def interpolate(values: Sequence[Any], t: float) -> Any:
    """The value of a gradient at depth ``t`` in [0, 1]: linear between numbers, the step below for anything else.

    >>> interpolate([0.0, 1.0, 0.0], 0.25)
    0.5
    >>> interpolate([True, False], 0.9)
    True
    """
    last = len(values) - 1
    place = t * last
    below = min(math.floor(place), last)
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return values[below]
    above = min(below + 1, last)
    share = place - below
    return (1 - share) * values[below] + share * values[above]


def evaluate_setting(tensor_name: str, setting: Any, t: float = 0, kind: Kind | None = None) -> Any:
    """The value of ``setting`` for a tensor at depth ``t``; None where it yields none.

    With ``kind`` each value is read as that type, before and after interpolation; ParameterError if it can't be.
    """
    value, _ = first_match(setting, tensor_name)
    if value is UNSET or (isinstance(value, list) and not value):
        return None
    if isinstance(value, list):
        members = [kind.read(v) for v in value] if kind else value
        value = interpolate(members, t)
        if isinstance(kind, Integer):
            value = round(value)
    return kind.read(value) if kind else value
