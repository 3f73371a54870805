"""Which value a parameter has for one output tensor: scopes in order of precedence, filters, gradients, defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.methods.spec import REQUIRED, Method, Parameter
from mergekit.recipe.settings import evaluate_setting, first_match

__all__ = ["InputScope", "MissingParameterError", "Told", "resolve_parameters"]

Scope = Mapping[str, Any]
Told = Callable[[Parameter, int | None, Any, Scope | None, tuple[str | int, ...]], None]
"""Hears of each value: its parameter, the input that has it (None: all), the value, and where it comes from: the scope
(None: the default) and the path inside the scope's setting."""


class MissingParameterError(LookupError):
    """A parameter without default has no value; ``index`` is the input concerned, or None for a shared parameter.

    ``given`` is the first setting of it that says nothing about the tensor: an empty list, or filters that don't match.
    """

    def __init__(self, name: str, index: int | None, given: Any = None) -> None:
        super().__init__(name)
        self.name = name
        self.index = index
        self.given = given


@dataclass(frozen=True, slots=True, eq=False)
class InputScope:
    """What one input contributes: the tensor's name in that model, its own scopes, and whether it is the base."""

    tensor: str
    own: Scope
    by_model: Scope
    is_base: bool


def resolve_parameters(
    method: Method,
    tensor: str,
    t: float,
    inputs: Sequence[InputScope],
    slice_scope: Scope,
    outer: Sequence[Scope],
    told: Told = lambda *origin: None,
) -> dict[str, Any]:
    """The values of a method's parameters and options for one output tensor, by the keyword of its function.

    Shared parameters match filters against the output name ``tensor``, per-model ones against the name in that
    model. Precedence: the input's own scope, the slice, ``input_model_parameters``, then ``outer`` (the module's and
    the top level's parameters), then the default. ``t`` is the depth in [0, 1]. ``told`` hears where values come from.
    """
    values: dict[str, Any] = {}
    for parameter in (*method.params, *method.options):
        if not parameter.used:
            continue
        if parameter.scope == "once":
            values[parameter.argument] = _first(parameter, tensor, t, [slice_scope, *outer], None, told)
            continue
        members = []
        for index, source in enumerate(inputs):
            if parameter.scope == "each" and source.is_base:
                continue
            scopes = [source.own, slice_scope, source.by_model, *outer]
            members.append(_first(parameter, source.tensor, t, scopes, index, told))
        values[parameter.argument] = tuple(members)
    return values


def _first(parameter: Parameter, tensor: str, t: float, scopes: Sequence[Scope], index: int | None, told: Told) -> Any:
    for scope in scopes:
        if parameter.name in scope:
            value = evaluate_setting(tensor, scope[parameter.name], t, parameter.kind)
            if value is not None:
                told(parameter, index, value, scope, first_match(scope[parameter.name], tensor)[1])
                return value
    if parameter.default is REQUIRED:
        given = (scope[parameter.name] for scope in scopes if parameter.name in scope)
        raise MissingParameterError(parameter.name, index, next(given, None))
    told(parameter, index, parameter.default, None, ())
    return parameter.default
