"""The kinds of value that a method's parameters take: how text and YAML become them, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergekit.errors import nearest

__all__ = ["Choice", "Flag", "Integer", "Kind", "ParameterError", "Real"]

_MOST = 1e30
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class ParameterError(ValueError):
    """A parameter's value can't be used; the planner adds the place in the recipe."""


@dataclass(frozen=True, slots=True)
class Real:
    """A finite real number, within ``low`` and ``high`` where given. Text such as ``1e-5`` is read as a number.

    ``usual``: the bounds beyond which a value is taken, but probably a mistake.
    """

    low: float | None = None
    high: float | None = None
    usual: tuple[float, float] | None = None

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
        if abs(number) > _MOST:
            raise ParameterError(f"{number:g} is beyond what arithmetic in float32 can hold")
        if (self.low is not None and number < self.low) or (self.high is not None and number > self.high):
            raise ParameterError(f"{number:g} is outside {self}")
        return number

    def __str__(self) -> str:
        """The type as shown in help."""
        usual = f", usually{_bounds(*self.usual)}" if self.usual else ""
        return f"number{_bounds(self.low, self.high)}{usual}"


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number, within ``low`` and ``high`` where given."""

    low: int | None = None
    high: int | None = None

    def read(self, value: object) -> int:
        """``value`` as an int; ParameterError says what is wrong with it."""
        number = Real(self.low, self.high).read(value)
        if number != int(number):
            raise ParameterError(f"expected a whole number, got {number:g}")
        return int(number)

    def __str__(self) -> str:
        """The type as shown in help."""
        return f"whole number{_bounds(self.low, self.high)}"


def _bounds(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    return f" in [{'-inf' if low is None else f'{low:g}'}, {'inf' if high is None else f'{high:g}'}]"


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false. Text such as ``"false"`` and the numbers 0 and 1 are read too."""

    def read(self, value: object) -> bool:
        """``value`` as a bool; ParameterError says what is wrong with it."""
        if isinstance(value, bool):
            return value
        if isinstance(value, (int, float)) and value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
            return value.lower() in _TRUE
        raise ParameterError(f"expected true or false, got {value!r}")

    def __str__(self) -> str:
        """The type as shown in help."""
        return "true or false"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words. ``flags``: what false and true stand for, where old recipes have a flag here.

    >>> Choice(("none", "l1", "density"), flags=("none", "l1")).read(True)
    'l1'
    """

    words: tuple[str, ...]
    flags: tuple[str, str] | None = None

    def read(self, value: object) -> str:
        """``value`` as one of the words; ParameterError says what is wrong with it."""
        if isinstance(value, str) and value in self.words:
            return value
        if self.flags:
            try:
                return self.flags[Flag().read(value)]
            except ParameterError:
                pass
        if isinstance(value, str):
            raise ParameterError(f"'{value}' is none of its values. {nearest(value, self.words)}")
        raise ParameterError(f"expected one of {', '.join(self.words)}, got {value!r}")

    def __str__(self) -> str:
        """The type as shown in help."""
        old = f"; false and true mean {' and '.join(self.flags)}" if self.flags else ""
        return " or ".join(self.words) + old


Kind = Real | Integer | Flag | Choice
