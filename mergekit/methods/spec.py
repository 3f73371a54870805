"""What a merge method declares about itself. The declaration feeds validation, help, docs, model cards and tests."""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mergekit.errors import UsageError, nearest

__all__ = [
    "REQUIRED",
    "Flag",
    "Method",
    "Parameter",
    "ParameterError",
    "Real",
    "Span",
    "Sparse",
    "each",
    "get_method",
    "ignored",
    "method",
    "method_names",
    "once",
]


class ParameterError(ValueError):
    """A parameter's value can't be used; the planner adds the place in the recipe."""


class _Required:
    """The default of a parameter that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


@dataclass(frozen=True, slots=True)
class Real:
    """A finite real number, within ``low`` and ``high`` where given. Text such as ``1e-5`` is read as a number."""

    low: float | None = None
    high: float | None = None

    def read(self, value: object) -> float:
        """``value`` as a float; ParameterError says what is wrong with it."""
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise ParameterError(f"expected a number, got '{value}'") from None
        if isinstance(value, bool):
            value = float(value)
        if not isinstance(value, (int, float)):
            raise ParameterError(f"expected a number, got {value!r}")
        try:
            number = float(value)
        except OverflowError:
            raise ParameterError("expected a finite number, got one beyond the range of float64") from None
        if not math.isfinite(number):
            raise ParameterError(f"expected a finite number, got {number}")
        if (self.low is not None and number < self.low) or (self.high is not None and number > self.high):
            raise ParameterError(f"{number:g} is outside {self}")
        return number

    def __str__(self) -> str:
        """The type as shown in help."""
        if self.low is None and self.high is None:
            return "number"
        low = "-inf" if self.low is None else f"{self.low:g}"
        high = "inf" if self.high is None else f"{self.high:g}"
        return f"number in [{low}, {high}]"


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false. Text such as ``"false"`` and the numbers 0 and 1 are read too."""

    def read(self, value: object) -> bool:
        """``value`` as a bool; ParameterError says what is wrong with it."""
        if isinstance(value, bool):
            return value
        if isinstance(value, (int, float)) and value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return value.lower() in ("true", "yes", "on", "1")
        raise ParameterError(f"expected true or false, got {value!r}")

    def __str__(self) -> str:
        """The type as shown in help."""
        return "true or false"


Scope = Literal["once", "each", "input"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One option of a method.

    ``scope`` says how many values there are: ``once`` one for the output tensor, ``each`` one for every model but
    the base, ``input`` one for every model. ``used`` is False for words that recipes carry but that change nothing.
    """

    name: str
    kind: Real | Flag
    scope: Scope
    default: Any
    help: str
    used: bool = True

    @property
    def argument(self) -> str:
        """The keyword of the method's function: the name, with an underscore where Python reserves it."""
        return self.name + "_" if keyword.iskeyword(self.name) else self.name


def once(name: str, kind: Real | Flag, default: Any = REQUIRED, *, help: str) -> Parameter:
    """Declare a parameter with one value for each output tensor."""
    return Parameter(name, kind, "once", default, help)


def each(name: str, kind: Real | Flag, default: Any = REQUIRED, *, help: str, base: bool = False) -> Parameter:
    """Declare a parameter with a value for every model but the base (``base=True``: for every model)."""
    return Parameter(name, kind, "input" if base else "each", default, help)


def ignored(name: str, kind: Real | Flag, *, help: str) -> Parameter:
    """Declare a word that recipes of arcee mergekit carry and that never changes a result."""
    return Parameter(name, kind, "once", None, help, used=False)


@dataclass(frozen=True, slots=True)
class Span:
    """The result is a weighted sum of the inputs, whose coefficients may depend on their Gram matrix.

    ``space="deltas"``: coefficients apply to the differences from the base, which is added back. ``gram`` says
    whether the function needs the Gram matrix: a first pass over the data.
    """

    space: Literal["weights", "deltas"]
    gram: bool = False


@dataclass(frozen=True, slots=True)
class Sparse:
    """The result is the base plus a combination of sparsified deltas, described by a ``SparseMerge``."""


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method: its declaration and its function.

    ``base``: ``required`` (given to the function as the first input) or ``ignored`` (an ordinary input).
    ``least`` and ``most`` bound the number of inputs, base included. ``lone``: what to do with a tensor that only
    one input has: ``pass`` it through as it is, or ``merge`` it like any other.
    """

    name: str
    title: str
    form: Span | Sparse
    base: Literal["required", "ignored"]
    least: int
    most: int | None
    lone: Literal["pass", "merge"]
    paper: str | None
    url: str | None
    params: tuple[Parameter, ...]
    function: Callable[..., Any]

    def parameter(self, name: str) -> Parameter | None:
        """The declared parameter called ``name``."""
        return next((p for p in self.params if p.name == name), None)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


_REGISTRY: dict[str, Method] = {}
F = TypeVar("F", bound=Callable[..., Any])


def method(
    name: str,
    *,
    title: str,
    form: Span | Sparse,
    base: Literal["required", "ignored"],
    models: tuple[int, int | None],
    paper: str | None,
    url: str | None,
    params: list[Parameter],
    lone: Literal["pass", "merge"] = "merge",
) -> Callable[[F], F]:
    """Register the decorated function as merge method ``name``; the function itself stays as it is.

    ``models`` is the least and the greatest number of inputs, base included (None: any). A second method of the
    same name is refused.
    """

    def register(function: F) -> F:
        if name in _REGISTRY:
            raise UsageError(f"a merge method called '{name}' is registered already")
        _REGISTRY[name] = Method(
            name, title, form, base, models[0], models[1], lone, paper, url, tuple(params), function
        )
        return function

    return register


def get_method(name: str) -> Method:
    """The method called ``name``; UsageError with the nearest name otherwise."""
    if name not in _REGISTRY:
        raise UsageError(f"no merge method '{name}'. {nearest(name, _REGISTRY)}")
    return _REGISTRY[name]


def method_names() -> tuple[str, ...]:
    """Every registered name, in the order of registration."""
    return tuple(_REGISTRY)
