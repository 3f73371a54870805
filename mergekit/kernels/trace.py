"""What a function of arrays computes, found by calling it once with symbols: the program that ``fused`` compiles.

A method's elementwise function is plain array code. Called with symbols in place of arrays it leaves a list of
operations on single elements, which one loop can do without an array for each step. Numbers that meet a symbol become
arguments of the program, so another parameter or another sum means no other program. What can't be recorded (a branch
on an element, a function that ``Arrays`` lacks, a step that numpy would take in float64) is no fault: the function is
then called with arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

__all__ = ["Program", "Symbols", "Trace", "UntraceableError", "record"]

_MOST_OPERATIONS = 120
"""Longer programs take many seconds to compile."""

Operation = tuple[str, tuple[int, ...]]

_ARITHMETIC = {"add", "subtract", "multiply", "divide", "negative", "absolute", "sign", "sqrt", "minimum", "maximum"}
_COMPARISONS = {"less", "less_equal", "greater", "greater_equal", "equal", "not_equal"}
_LOGIC = {"bitwise_and", "bitwise_or", "bitwise_xor", "invert", "logical_and", "logical_or", "logical_not"}


class UntraceableError(Exception):
    """The function is not a sequence of operations on single float32 elements."""


@dataclass(frozen=True, slots=True)
class Program:
    """Operations on one element. Each is a name and the positions of its arguments among the operations before.

    ``("input", (m,))`` is the element of array ``m``, ``("scalar", (k,))`` number ``k`` of those that come with the
    call. ``results`` are the positions of what is returned, float32 each.
    """

    operations: tuple[Operation, ...]
    results: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A program and the numbers (float32 [k]) that this call of the function goes with."""

    program: Program
    scalars: np.ndarray


def record(
    function: Callable[..., Any],
    arrays: int,
    extra: tuple[Any, ...] = (),
    parameters: Mapping[str, Any] = MappingProxyType({}),
    *,
    sums: bool = False,
) -> Trace:
    """What ``function(xp, x, *extra, **parameters)`` does to ``arrays`` float32 arrays ``x``.

    ``sums``: the function returns an array of sums, and the program's results are their terms; otherwise it has one
    result. Raises UntraceableError, whatever went wrong, also where the function went on after it: what it then
    returns is not what it computes from arrays.
    """
    recorder = _Recorder()
    x = tuple(recorder.value("input", m) for m in range(arrays))
    try:
        returned = function(Symbols(), x, *extra, **parameters)
    except (Exception, SystemExit) as error:
        raise UntraceableError(str(error)) from error
    if recorder.fault is not None:
        raise UntraceableError(recorder.fault)
    if len(recorder.operations) > _MOST_OPERATIONS:
        raise UntraceableError("it takes too many steps")
    if sums and type(returned) is Sums:
        results = tuple(recorder.floats(term.value).position for term in returned.terms)
    elif not sums and type(returned) is Value and not returned.is_bool:
        results = (returned.position,)
    else:
        raise UntraceableError("it returns something else")
    with np.errstate(over="ignore"):  # numpy takes a number beyond float32 for infinity, too
        scalars = np.array(recorder.scalars, np.float32)
    return Trace(Program(tuple(recorder.operations), results), scalars)


class _Recorder:
    """The operations so far; one that was done before is not done again."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.scalars: list[float] = []
        self.fault: str | None = None
        self._known: dict[Operation, int] = {}

    def value(self, name: str, *arguments: int, is_bool: bool = False) -> Value:
        """The result of an operation on earlier ones."""
        operation = (name, arguments)
        if operation not in self._known:
            self._known[operation] = len(self.operations)
            self.operations.append(operation)
        return Value(self, self._known[operation], is_bool)

    def fail(self, reason: str) -> UntraceableError:
        """The exception to raise. That it was raised is remembered: the function may catch it."""
        self.fault = self.fault or reason
        return UntraceableError(reason)

    def floats(self, value: Value) -> Value:
        """Truth values as 0 and 1."""
        return self.value("to_float", value.position) if value.is_bool else value

    def operation(self, name: str, operands: Sequence[Any]) -> Value:
        """A function of numpy, in the type that numpy gives it if the arrays are float32 or bool.

        Plain numbers adapt to the arrays; anything else beside them may not.
        """
        values = [self._operand(operand) for operand in operands]
        given = [value.is_bool for value, operand in zip(values, operands, strict=True) if value is operand]
        if name in _LOGIC:
            if not all(value.is_bool for value in values):
                raise self.fail("bits of numbers")
            return self.value(name, *(value.position for value in values), is_bool=True)
        if name not in _COMPARISONS | _ARITHMETIC:
            raise self.fail(f"{name} is not recorded")
        if all(given):
            raise self.fail(f"{name} of truth values")
        return self.value(name, *(self.floats(value).position for value in values), is_bool=name in _COMPARISONS)

    def choice(self, condition: Any, left: Any, right: Any) -> Value:
        """``numpy.where``."""
        if type(condition) is not Value or not condition.is_bool:
            raise self.fail("a choice by numbers")
        if not any(type(operand) is Value and not operand.is_bool for operand in (left, right)):
            raise self.fail("a choice among plain numbers")
        values = [self.floats(self._operand(operand)) for operand in (left, right)]
        return self.value("where", condition.position, *(value.position for value in values))

    def _operand(self, operand: Any) -> Value:
        if type(operand) is Value and operand.recorder is self:
            return operand
        if type(operand) not in (float, int, np.float32):
            raise self.fail(f"an operation with {type(operand).__name__}")
        self.scalars.append(float(operand))
        return self.value("scalar", len(self.scalars) - 1)


@dataclass(frozen=True, eq=False)
class Value(NDArrayOperatorsMixin):
    """One element of an array to come: float32, or true or false. Operators and numpy's functions take it."""

    recorder: _Recorder
    position: int
    is_bool: bool

    def __bool__(self) -> bool:
        raise self.recorder.fail("a branch on an element")

    def __getattr__(self, name: str) -> Any:
        self.recorder.fail(f"a look at its {name}")
        raise AttributeError(name)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise self.recorder.fail("an array of symbols")

    @property
    def __class__(self) -> Any:
        """Asked for where a function looks at what it was given."""
        self.recorder.fail("a look at its type")
        return Value

    def __array_ufunc__(self, ufunc: np.ufunc, call: str, *operands: Any, **options: Any) -> Value:
        if call != "__call__" or options:
            raise self.recorder.fail(f"{ufunc.__name__} with options")
        if ufunc is np.square or (ufunc is np.power and type(operands[1]) in (int, float) and operands[1] == 2):
            return np.multiply(operands[0], operands[0])
        if ufunc is np.positive:
            return self
        return self.recorder.operation(ufunc.__name__, operands)

    def __array_function__(self, function: Any, types: Any, operands: tuple[Any, ...], options: Any) -> Any:
        if options:
            raise self.recorder.fail(f"{function.__name__} with options")
        if function is np.where and len(operands) == 3:
            return self.recorder.choice(*operands)
        if function is np.clip and len(operands) == 3 and operands[0] is self:
            value, low, high = operands
            return np.minimum(np.maximum(value, low), high)
        if function is np.sum and len(operands) == 1:
            return Sum(self)
        if function is np.count_nonzero and len(operands) == 1:
            return Sum(self if self.is_bool else self.recorder.operation("not_equal", [self, 0]))
        raise self.recorder.fail(f"{function.__name__} is not recorded")


@dataclass(frozen=True, slots=True)
class Sums:
    """An array of sums."""

    terms: tuple[Sum, ...]


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of an element over the array."""

    value: Value

    def __array_function__(self, function: Any, types: Any, operands: tuple[Any, ...], options: Any) -> Any:
        terms = tuple(operands[0]) if function is np.stack and not options and len(operands) == 1 else ()
        if not terms or not all(type(term) is Sum for term in terms):
            raise self.value.recorder.fail(f"{function.__name__} of sums")
        return Sums(terms)


class Symbols:
    """What stands for the module of arrays: numpy, whose functions take symbols, with an ``asarray`` that does, too."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def asarray(self, value: Any, dtype: Any = None) -> Value:
        """Truth values as 0 and 1; floats as they are."""
        if type(value) is not Value:
            raise UntraceableError("an array of something else")
        if dtype not in (None, np.float32):
            raise value.recorder.fail("a change of type")
        return value if dtype is None else value.recorder.floats(value)
