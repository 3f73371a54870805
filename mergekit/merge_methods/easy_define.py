"""The decorator with which methods for arcee mergekit up to 0.1.4 were written: a function of whole tensors.

    @merge_method(name="average", pretty_name="Average", reference_url="https://example.org")
    def average(tensors: list[torch.Tensor], weight: list[float] = 1.0) -> torch.Tensor: ...

The annotations are the declaration, the method is registered at once, and the function stays as it is.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mergekit.methods import Flag, Integer, Method, Real, Whole, each, once
from mergekit.methods.kinds import Kind
from mergekit.methods.spec import REQUIRED, Base, Parameter, register

__all__ = ["merge_method"]

F = TypeVar("F", bound=Callable[..., Any])

_KINDS: dict[Any, Kind] = {float: Real(), int: Integer(), bool: Flag()}
_NEWER = ("TensorGroup", "TensorBatch")
_COUNT = "_others"
"""A parameter that no recipe sets: it has a value for each model but the base, and so tells how many there are."""


def merge_method(name: str, reference_url: str | None = None, pretty_name: str | None = None) -> Callable[[F], F]:
    """Register the decorated function of tensors as merge method ``name``, in the form ``whole``.

    The function is ``f(tensors: list[Tensor], [base_tensor: Tensor | Optional[Tensor]], **parameters) -> Tensor``.
    ``base_tensor: Tensor`` makes the base model required; with ``base_tensor`` the base is not among ``tensors``,
    without it the base comes first, if there is one. Other parameters are annotated ``int``, ``float`` or ``bool``
    (one value), or as a list of ``float`` or ``int`` (one for each of ``tensors``, whose default is one number); those
    without a default are required. Tensors are float32, and so is the result, which is rounded once.

    TypeError, at once, for a signature that says something else.
    """

    def decorate(function: F) -> F:
        hints = _hints(function, name)
        base = _base(function, hints, name)
        names = [n for n in inspect.signature(function).parameters if n not in ("tensors", "base_tensor")]
        defaults = {n: p.default for n, p in inspect.signature(function).parameters.items()}
        params = [_parameter(name, n, hints.get(n), defaults[n], base is None) for n in names]
        listed = [p.argument for p in params if p.scope != "once"]

        @wraps(function)
        def whole(x: list[Any], **values: Any) -> Any:
            count = len(values.pop(_COUNT))
            for argument in listed:
                values[argument] = list(values[argument])
            if base is None:
                return function(tensors=x, **values)
            base_tensor = x[0] if len(x) > count else None
            return function(tensors=x[len(x) - count :], base_tensor=base_tensor, **values)

        counter = each(_COUNT, Flag(), None, help="")
        register(
            Method(
                name,
                pretty_name or name,
                Whole("weights"),
                base or "optional",
                2 if base == "required" else 1,
                None,
                "merge",
                None,
                reference_url,
                (*params, counter),
                whole,
            )
        )
        return function

    return decorate


def _hints(function: Callable[..., Any], name: str) -> dict[str, Any]:
    """The annotations of the function; TypeError unless the first parameter is ``tensors``, a list of tensors."""
    import torch

    parameters = inspect.signature(function).parameters
    first = next(iter(parameters), "")
    written = str(function.__annotations__.get(first, "")) if hasattr(function, "__annotations__") else ""
    if any(word in written for word in _NEWER):
        raise TypeError(
            f"'{name}' is written for the decorator of arcee mergekit 0.1.5, which works on groups of tensors; "
            "write it with mergekit.methods.method, or as a function of a list of tensors"
        )
    try:
        hints = get_type_hints(function)
    except Exception as error:
        raise TypeError(f"'{name}': its annotations can't be read ({type(error).__name__}: {error})") from None
    if (
        first != "tensors"
        or get_origin(hints.get("tensors")) is not list
        or get_args(hints["tensors"])[0] is not (torch.Tensor)
    ):
        raise TypeError(f"'{name}': its first parameter must be 'tensors: list[torch.Tensor]'")
    if hints.get("return", torch.Tensor) is not torch.Tensor:
        raise TypeError(f"'{name}' must return torch.Tensor")
    for unavailable in ("output_weight", "base_model"):
        if unavailable in parameters:
            raise TypeError(
                f"'{name}' asks for '{unavailable}', but methods see tensors only, never names or files; "
                f"remove it, and set what differs between tensors by filters in the recipe"
            )
    return hints


def _base(function: Callable[..., Any], hints: dict[str, Any], name: str) -> Base | None:
    """What the method needs of a base; None if it takes it for an input like the others."""
    import torch

    if "base_tensor" not in inspect.signature(function).parameters:
        return None
    hint = hints.get("base_tensor")
    if hint is torch.Tensor:
        return "required"
    if get_origin(hint) in (Union, types.UnionType) and set(get_args(hint)) == {torch.Tensor, type(None)}:
        return "optional"
    raise TypeError(f"'{name}': annotate 'base_tensor' as torch.Tensor or Optional[torch.Tensor]")


def _parameter(method: str, name: str, hint: Any, default: Any, has_base: bool) -> Parameter:
    """The declaration of one parameter. ``has_base``: lists have a value for the base, too."""
    value = REQUIRED if default is inspect.Parameter.empty else default
    if hint in _KINDS:
        return once(name, _KINDS[hint], value, help="")
    item = get_args(hint)[0] if get_origin(hint) is list else None
    if item in (float, int):
        if isinstance(value, (list, tuple)):
            raise TypeError(f"'{method}': the default of the list '{name}' is one number, for each model")
        return each(name, _KINDS[item], value, help="", base=has_base)
    raise TypeError(f"'{method}': parameter '{name}' must be annotated int, float, bool, list[float] or list[int]")
