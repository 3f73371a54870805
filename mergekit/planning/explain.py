"""Where each value in a plan comes from: which line of the recipe, which filter, which gradient, or a default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.methods.spec import Parameter
from mergekit.planning.build import PlanOptions, build_plan
from mergekit.planning.plan import Plan
from mergekit.planning.slots import Slot
from mergekit.recipe import Recipe
from mergekit.recipe.recipe import parameter_scopes

__all__ = ["Explanation", "Setting", "explain_plan"]

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of one parameter for one output tensor.

    ``model`` is the position of the source whose value it is, None for what all share. ``place`` is
    ``file:line:column`` (None: a default), ``how`` says which filter matched and what gradient the value is read from.
    """

    tensor: str
    parameter: str
    model: int | None
    value: Any
    place: str | None
    how: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan, the settings of its tensors in order, and the places of settings that no tensor takes."""

    plan: Plan
    settings: tuple[Setting, ...]
    unused: tuple[tuple[str, str], ...]

    def of(self, tensor: str) -> list[Setting]:
        """The settings of one output tensor."""
        return [setting for setting in self.settings if setting.tensor == tensor]


def explain_plan(recipe: Recipe, options: PlanOptions) -> Explanation:
    """Plan ``recipe`` and note where every value comes from. Raises what ``build_plan`` raises."""
    paths = {id(scope.values): scope.path for scope in parameter_scopes(recipe.config)}
    settings: list[Setting] = []
    used: set[Path_] = set()

    def listen(
        slot: Slot, parameter: Parameter, model: int | None, value: Any, scope: Mapping[str, Any] | None, inside: Path_
    ) -> None:
        path = None if scope is None else paths.get(id(scope))
        if scope is None or path is None:  # a default, of the method or of embed_slerp
            settings.append(Setting(slot.name, parameter.name, model, value, None, ""))
            return
        used.add((*path, parameter.name, *inside))
        place = recipe.text.place((*path, parameter.name, *inside))
        how = _how(scope[parameter.name], inside, slot.t)
        settings.append(Setting(slot.name, parameter.name, model, value, place, how))

    plan = build_plan(recipe, options, listen)
    return Explanation(plan, tuple(settings), tuple(_unused(recipe, used)))


def _how(setting: Any, inside: Path_, depth: float) -> str:
    """Which filter let a value through, and which gradient it is read from, at which depth."""
    entry = setting
    for step in inside[:-1]:
        entry = entry[step]
    pattern = entry.get("filter") if isinstance(entry, dict) else None
    value = entry["value"] if isinstance(entry, dict) else entry
    parts = [f"filter {pattern!r}"] if pattern else []
    if isinstance(value, list):
        parts.append(f"gradient {value} at depth {depth:.2f}")
    return ", ".join(parts)


def _unused(recipe: Recipe, used: set[Path_]) -> list[tuple[str, str]]:
    """The place and name of each setting, or entry of one with filters, from which no tensor took its value."""
    found = []
    for scope in parameter_scopes(recipe.config):
        for name, setting in scope.values.items():
            parameter = recipe.method.parameter(name)
            if parameter is None or not parameter.used:
                continue  # the recipe's own remarks tell of these
            entries: list[Path_] = [()]
            if isinstance(setting, dict):
                entries = [("value",)]
            elif isinstance(setting, list) and setting and isinstance(setting[0], dict):
                entries = [(i, "value") for i in range(len(setting))]
            for inside in entries:
                path = (*scope.path, name, *inside)
                if path not in used:
                    found.append((recipe.text.place(path), name))
    return found
