"""The parameters of a method as Python values: names checked, one value or one for each input."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from mergekit.errors import nearest
from mergekit.methods import Method, ParameterError
from mergekit.methods.spec import REQUIRED, Parameter

__all__ = ["argument_values", "check_names"]

_OPTIONS = ("svc",)
"""The options of delta methods that are about one tensor; others need the depth of its layer, or whole models."""


def check_names(method: Method, given: Mapping[str, Any]) -> None:
    """TypeError for a name that is no parameter of the method."""
    known = [p.name for p in _parameters(method)]
    for name in given:
        if name in known:
            continue
        if method.parameter(name):
            raise TypeError(f"'{name}' is an option of recipes: it is about whole models, not about one tensor")
        hint = nearest(name, known) if known else "It has none."
        raise TypeError(f"'{method.name}' has no parameter '{name}'. {hint}")


def argument_values(
    method: Method, given: Mapping[str, Any], ids: Sequence[Hashable], order: Sequence[int], base: int | None
) -> dict[str, Any]:
    """The keyword arguments of the method's function, and its options.

    ``ids`` are those of all inputs, ``order`` the positions of those that take part, ``base`` that of the base model.
    A value for each input is a scalar, a sequence in the order of ``ids`` (without the base if that has no value), or
    a mapping by id. TypeError for one that is missing, ParameterError for one that can't be used.
    """
    values: dict[str, Any] = {}
    for parameter in _parameters(method):
        if not parameter.used:
            continue
        value = given.get(parameter.name)
        if parameter.scope == "once":
            values[parameter.argument] = _read(method, parameter, _plain(value), "")
            continue
        owners = [i for i in range(len(ids)) if parameter.scope == "input" or i != base]
        by_owner = _by_owner(parameter, _plain(value), owners, ids)
        values[parameter.argument] = tuple(
            _read(method, parameter, by_owner[i], f" of input {ids[i]!r}") for i in order if i in by_owner
        )
    return values


def _parameters(method: Method) -> list[Parameter]:
    return [*method.params, *(p for p in method.options if p.name in _OPTIONS)]


def _by_owner(parameter: Parameter, value: Any, owners: Sequence[int], ids: Sequence[Hashable]) -> dict[int, Any]:
    """The value for each position in ``owners``."""
    if isinstance(value, Mapping):
        allowed = [ids[i] for i in owners]
        for name in value:
            if name not in allowed:
                known = ", ".join(map(repr, allowed))
                raise TypeError(f"'{parameter.name}' is given for {name!r}, but the inputs that have it are {known}")
        return {i: _plain(value.get(ids[i])) for i in owners}
    if isinstance(value, (list, tuple)):
        if len(value) != len(owners):
            raise ParameterError(f"'{parameter.name}' has {len(value)} values for {len(owners)} inputs")
        return {i: _plain(v) for i, v in zip(owners, value, strict=True)}
    return dict.fromkeys(owners, value)


def _read(method: Method, parameter: Parameter, value: Any, whose: str) -> Any:
    if value is None:
        if parameter.default is REQUIRED:
            raise TypeError(f"'{method.name}' needs '{parameter.name}'{whose}")
        return parameter.default
    try:
        return parameter.kind.read(value)
    except ParameterError as error:
        raise ParameterError(f"'{parameter.name}'{whose}: {error}") from None


def _plain(value: Any) -> Any:
    """Numbers and lists of numpy and torch as those of Python."""
    return value.tolist() if hasattr(value, "tolist") else value
