"""Hold the functions of methods that are not built in to their forms: a fault becomes one line that names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from mergekit.errors import MergekitError, UsageError
from mergekit.methods.rules import GroupTop, KeepRule, MagnitudeBand, SparseMerge
from mergekit.methods.spec import Elementwise, Method, ParameterError, Span, Sparse, Vectors

__all__ = ["guarded", "is_built_in", "rehearse"]


def is_built_in(method: Method) -> bool:
    """Whether the method is one of ours."""
    return method.function.__module__.startswith("mergekit.methods.")


def guarded(method: Method, tensor: str, count: int) -> Method:
    """``method``, its functions held to what its form says they return, for ``tensor`` and ``count`` inputs.

    ``count`` is the number of tensors that the function is about: without the base in the space of deltas. The
    functions then raise UsageError for what they raise or return otherwise. Those of built-in methods stay as they are.
    """
    if is_built_in(method):
        return method
    place = f"method '{method.name}' on tensor {tensor}"
    form = method.form

    def hold(function: Callable[..., Any], what: str, expected: Callable[..., str | None]) -> Callable[..., Any]:
        def call(*args: Any, **parameters: Any) -> Any:
            # What it does to its arguments must not change what is expected of it.
            kept = tuple(list(arg) if isinstance(arg, list) else arg for arg in args)
            try:
                result = function(*args, **parameters)
                wanted = expected(result, kept)
            except ParameterError as error:
                if what == "its function" and not isinstance(form, Sparse) and not early(args):
                    raise UsageError(f"{place}: {error}") from error
                raise
            except (MergekitError, MemoryError):
                raise
            except (Exception, SystemExit) as error:
                raise UsageError(f"{place}: {what} failed: {_said(error)}") from error
            if wanted is not None:
                raise UsageError(f"{place}: {what} must return {wanted}, not {_told(result)}")
            return result

        return call

    def early(args: tuple[Any, ...]) -> bool:
        """Whether a call is one of planning, whose faults the planner gives a place in the recipe."""
        return isinstance(form, Span) and args == (None,)

    if method.check:
        method = replace(method, check=hold(method.check, "its 'check'", lambda r, a: None))
    if isinstance(form, Span):
        if form.vectors:
            form = replace(form, vectors=hold(form.vectors, "its 'vectors'", _vectors))
        function = hold(method.function, "its function", lambda r, a: _span(r, a, count))
        return replace(method, function=function, form=form)
    if isinstance(form, Sparse):
        return replace(method, function=hold(method.function, "its function", lambda r, a: _sparse(r, count)))
    if isinstance(form, Elementwise):
        form = replace(
            form,
            measure=form.measure and hold(form.measure, "its 'measure'", _sums),
            key=form.key and hold(form.key, "its 'key'", _chunk),
            keep=form.keep and hold(form.keep, "its 'keep'", _number),
        )
        return replace(method, function=hold(method.function, "its function", _chunk), form=form)
    if form.seconds:
        form = replace(form, seconds=hold(form.seconds, "its 'seconds'", _real))
    return replace(method, function=hold(method.function, "its function", _whole), form=form)


def rehearse(method: Method, parameters: Mapping[str, Any]) -> int | None:
    """Call what of a method needs no data, so that its faults show before anything is read.

    Returns the position of the input that is the result as it is, whatever the data; None if there is no such input.
    Raises ParameterError for values that the method can't use.
    """
    form = method.form
    if method.check:
        method.check(**parameters)
    if isinstance(form, Sparse):
        method.function(**parameters)
    elif isinstance(form, Span) and not form.gram:
        chosen = np.asarray(method.function(None, **parameters))
        at = np.flatnonzero(chosen)
        if form.space == "weights" and len(at) == 1 and chosen[at[0]] == 1.0:
            return int(at[0])
    return None


def _span(result: Any, args: tuple[Any, ...], count: int) -> str | None:
    gram = args[0]
    shape = (count,) if gram is None else np.shape(gram)[:-1]
    try:
        found = np.asarray(result, np.float64).shape if not np.iscomplexobj(result) else None
    except (TypeError, ValueError):
        found = None
    return None if found == shape else f"coefficients of shape {list(shape)}"


def _vectors(result: Any, args: tuple[Any, ...]) -> str | None:
    return None if result in get_args(Vectors) else f"one of {', '.join(get_args(Vectors))}"


def _sparse(result: Any, count: int) -> str | None:
    fits = isinstance(result, SparseMerge) and len(result.keep) == len(result.weight) == count
    if not fits:
        return f"a SparseMerge of {count} rules and weights"
    parts = [number for keep in result.keep for number in _settings(keep)]
    finite = all(map(_is_finite, [*result.weight, result.factor, *parts]))
    known = all(isinstance(keep, get_args(KeepRule)) for keep in result.keep)
    whole = all(
        isinstance(number, int) and number >= 0
        for keep in result.keep
        if isinstance(keep, GroupTop)
        for number in (keep.n, keep.m - 1)
    )
    bands = finite and all(keep.gamma >= 0 for keep in result.keep if isinstance(keep, MagnitudeBand))
    words = result.rescale in ("none", "l1", "density") and result.elect in ("weighted", "unweighted")
    flags = isinstance(result.consensus, bool) and isinstance(result.normalize, bool)
    fits = finite and known and whole and bands and words and flags
    return None if fits else "a SparseMerge of known rules, finite numbers, flags that are true or false, known words"


def _settings(keep: Any) -> list[Any]:
    return [getattr(keep, name) for name in ("density", "gamma", "epsilon", "n", "m") if hasattr(keep, name)]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and bool(np.isfinite(value))


def _chunk(result: Any, args: tuple[Any, ...]) -> str | None:
    shape = tuple(args[1][0].shape)
    fits = tuple(getattr(result, "shape", ())) == shape and not _is_odd(result)
    return None if fits else f"an array of real numbers of shape {list(shape)}"


def _whole(result: Any, args: tuple[Any, ...]) -> str | None:
    like = args[0][0]
    fits = isinstance(result, type(like)) and result.shape == like.shape and result.is_floating_point()
    fits = fits and result.device == like.device and result.layout == like.layout
    return None if fits else f"a tensor of numbers of shape {list(like.shape)}"


def _sums(result: Any, args: tuple[Any, ...]) -> str | None:
    return None if len(getattr(result, "shape", ())) == 1 and not _is_odd(result) else "an array of sums"


def _real(result: Any, args: tuple[Any, ...]) -> str | None:
    return None if _is_finite(result) else "a number"


def _number(result: Any, args: tuple[Any, ...]) -> str | None:
    return None if result is None or isinstance(result, (int, np.integer)) else "a number of elements, or None"


def _is_odd(values: Any) -> bool:
    """Whether the elements of an array of numpy or torch are no real numbers."""
    kind = str(getattr(values, "dtype", "object"))
    return not any(word in kind for word in ("float", "int")) or "complex" in kind


def _said(error: BaseException) -> str:
    """What an exception says, in one line, even if it can't speak."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _told(value: Any) -> str:
    """What a function returned, in a few words."""
    if isinstance(value, SparseMerge):
        return f"one of {len(value.keep)} rules and {len(value.weight)} weights"
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if shape is None and isinstance(value, (list, tuple)):
        shape = (len(value),)
    return kind if shape is None else f"{kind} of shape {list(shape)}"
