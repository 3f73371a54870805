"""Merge tensors that are in memory: the same numbers as a merge of files, and gradients where they are wanted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mergekit.api.arguments import argument_values, check_names
from mergekit.checkpoint import TensorInfo
from mergekit.dtypes import DType, promote
from mergekit.errors import UsageError
from mergekit.execute import run_works
from mergekit.execute.arrays import (
    ArrayReader,
    ArraySink,
    device_of,
    dtype_of,
    empty,
    floating,
    is_torch,
    wants_gradients,
)
from mergekit.execute.copy_work import CastWork, CopyWork
from mergekit.execute.merge_work import merge_work
from mergekit.execute.work import RANGE, Job, Work
from mergekit.methods import Method, get_method, method_names
from mergekit.methods.guard import guarded, rehearse
from mergekit.methods.spectral import matrix_shape
from mergekit.planning.expression import Apply, Cast, Read
from mergekit.planning.plan import OutputTensor

__all__ = ["merge_state_dicts", "merge_tensors"]

_LOG = logging.getLogger("mergekit")

Group = Mapping[int, Any]
"""The tensors of one name: input position to tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """What is asked for: ``base`` is the position of the base model, if one is named."""

    method: Method
    parameters: Mapping[str, Any]
    ids: tuple[Hashable, ...]
    base: int | None
    dtype: DType | None
    seed: int


def merge_tensors(
    tensors: Sequence[Any],
    method: str | Method | Callable[..., Any],
    parameters: Mapping[str, Any] | None = None,
    ids: Sequence[Hashable] | None = None,
    base_index: int | None = None,
    name: str | None = None,
    dtype: Any = None,
    out_dtype: Any = None,
    *,
    seed: int = 0,
) -> Any:
    """Merge tensors of one shape by a merge method; the result is what a merge of files would write.

    ``tensors`` are torch tensors, or numpy arrays (then so is the result). ``method`` is a name, or the function of a
    registered method. ``parameters`` go by their names in recipes; one with a value for each model takes a scalar (for
    all), a sequence in the order of the inputs (without the base, where it has no value), or a mapping by id. ``ids``
    default to 0, 1, ... ``base_index`` says which tensor is the base model's. ``name`` and ``seed`` key random masks,
    as the tensor's name and the recipe's seed do; so does a model's position, which is that in the recipe if the
    inputs are in its order, a base that it does not list among the models last.

    Arithmetic is float32; the result is rounded once, to ``out_dtype``, else ``dtype``, else the promotion of the
    inputs' types. Tensors that are no floats are copied if they are all the same. If an input requires gradients
    (and they are enabled), so does the result: selections and random masks then count as constants. Methods that
    decompose matrices (and ``svc``) have no gradients where singular values coincide, as those of zeros do: NaN.

    Raises TypeError for parameters that are unknown or missing and for what is no tensor, ValueError for values,
    shapes or numbers of inputs that don't fit, UsageError for an unknown method.

    >>> import numpy as np
    >>> a, b = np.float32([0, 1]), np.float32([1, 3])
    >>> merge_tensors([a, b], "linear", {"weight": [3, 1]})
    array([0.25, 1.5 ], dtype=float32)
    >>> merge_tensors([a, b], "task_arithmetic", {"weight": 0.5}, base_index=0)
    array([0.5, 2. ], dtype=float32)
    """
    request = _request(method, parameters, ids, len(tensors), base_index, out_dtype or dtype, seed)
    return _merge(request, {name or "": dict(enumerate(tensors))})[name or ""]


def merge_state_dicts(
    models: Sequence[Any] | Mapping[Hashable, Any],
    method: str | Method | Callable[..., Any],
    parameters: Mapping[str, Any] | None = None,
    base: Any = None,
    strict: bool = True,
    dtype: Any = None,
    out_dtype: Any = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Merge models in memory, tensor by tensor; a state dict of new tensors, in the order of the base (or the first).

    ``models`` are torch modules or state dicts; as a mapping, its keys are the models' ids. ``base`` is the id of the
    base model (its position in a sequence). ``strict``: all models must have the same tensors; else one that some of
    them lack is made from those that have it, if the method can (ValueError if not). Everything else is as in
    ``merge_tensors``.

    A module counts as its ``state_dict()``, without gradients; to keep them pass ``dict(module.named_parameters())``.
    """
    ids = tuple(models) if isinstance(models, Mapping) else tuple(range(len(models)))
    states = [_state(model) for model in (models.values() if isinstance(models, Mapping) else models)]
    if base is not None and base not in ids:
        raise ValueError(f"base={base!r} is none of the models: {', '.join(map(repr, ids))}")
    position = None if base is None else ids.index(base)
    request = _request(method, parameters, ids, len(ids), position, out_dtype or dtype, seed)
    names = dict.fromkeys(states[position or 0])
    for state in states:
        names.update(dict.fromkeys(state))
    if strict:
        for name in names:
            lacking = [repr(i) for i, state in zip(ids, states, strict=True) if name not in state]
            if lacking:
                raise ValueError(f"{', '.join(lacking)} lack(s) '{name}'; strict=False merges what there is")
    groups = {name: {i: state[name] for i, state in enumerate(states) if name in state} for name in names}
    return _merge(request, groups)


def _state(model: Any) -> Mapping[str, Any]:
    if isinstance(model, Mapping):
        return model
    if not hasattr(model, "state_dict"):
        raise TypeError(f"expected a module or a state dict, not {type(model).__name__}")
    state: Mapping[str, Any] = model.state_dict()
    return state


def _request(
    method: str | Method | Callable[..., Any],
    parameters: Mapping[str, Any] | None,
    ids: Sequence[Hashable] | None,
    count: int,
    base: int | None,
    dtype: Any,
    seed: int,
) -> _Request:
    names = tuple(ids) if ids is not None else tuple(range(count))
    if not count:
        raise ValueError("there is nothing to merge")
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"ids must be {count} different names, one for each input")
    if base is not None and not 0 <= base < count:
        raise ValueError(f"base_index={base}: there are {count} inputs, counted from 0")
    found = _method(method)
    check_names(found, parameters or {})
    return _Request(found, parameters or {}, names, base, floating(dtype) if dtype is not None else None, seed)


def _method(method: str | Method | Callable[..., Any]) -> Method:
    if isinstance(method, (str, Method)):
        return get_method(method)
    for known in map(get_method, method_names()):
        if method in (known.function, getattr(known.function, "__wrapped__", None)):
            return known
    raise UsageError(f"{method!r:.60} is no merge method; decorate a function with @method, or give a name")


def _merge(request: _Request, groups: Mapping[str, Group]) -> dict[str, Any]:
    """The merged tensors by name; one that can't be made of what there is is left out."""
    merged: dict[str, Any] = {}
    later: dict[str, _Task] = {}
    for name, group in groups.items():
        task = _task(request, name, group)
        if task is None:
            continue
        merged[name] = None  # keeps its place
        if task.is_constant or any(map(wants_gradients, task.tensors)):
            merged[name] = task.directly()
        else:
            later[name] = task
    size = sum(task.size for task in later.values())
    run_works(_opened(later, merged), threads=1 if size <= RANGE else None)
    for name, task in later.items():
        device = device_of(task.tensors[0])
        merged[name] = merged[name].to(device) if device != "cpu" else merged[name]
    return merged


def _opened(tasks: Mapping[str, _Task], merged: dict[str, Any]) -> Iterator[Work]:
    for name, task in tasks.items():
        merged[name], work = task.work()
        yield work


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """One tensor to make of ``tensors``: by a method, or (``apply`` None) a copy of the only one as ``dtype``.

    ``is_constant``: no floats, to be copied as they are.
    """

    name: str
    tensors: tuple[Any, ...]
    dtype: DType
    seed: int
    apply: Apply | None = None
    method: Method | None = None
    is_constant: bool = False

    @property
    def size(self) -> int:
        shape: Iterable[int] = self.tensors[0].shape
        total = 1
        for length in shape:
            total *= length
        return total

    def directly(self) -> Any:
        """The result by torch's own operations, which it can differentiate."""
        if self.is_constant:
            return self.tensors[0].clone() if is_torch(self.tensors[0]) else self.tensors[0].copy()
        from mergekit.api.differentiable import converted, merge_with_gradients

        if self.apply is None or self.method is None:
            return converted(self.tensors[0], self.dtype)
        return merge_with_gradients(self.method, self.apply, self.tensors, self.name, self.seed, self.dtype)

    def work(self) -> tuple[Any, Work]:
        """Where the result will be once the work is done, and the engine's work."""
        made, data = empty(self.tensors[0], self.dtype)
        shape = tuple(self.tensors[0].shape)
        expression = self.apply or Cast(_leaf(self.name, 0, self.tensors[0]))
        output = OutputTensor(self.name, shape, self.dtype, "", 0, data.size, expression)
        readers = tuple(map(ArrayReader, self.tensors))
        kernels = _kernels(device_of(self.tensors[0]))
        job = Job(output, readers, kernels, ArraySink(data), allow_nonfinite=True, seed=self.seed)
        if self.apply is not None:
            return made, merge_work(self.apply, job)
        return made, CopyWork(job) if readers[0].dtype == self.dtype else CastWork(job)


def _task(request: _Request, name: str, group: Group) -> _Task | None:
    """How one tensor is made; None, and a warning, if the method skips it for want of inputs."""
    method = request.method
    positions = sorted(group)
    place = f"tensor '{name}': " if name else ""
    dtypes = _check_alike(request, place, {i: group[i] for i in positions})
    first = group[positions[0]]
    if not all(dtype.is_float for dtype in dtypes):
        _check_identical(request, place, group, dtypes)
        return _Task(name, (first,), dtypes[0], request.seed, is_constant=True)
    dtype = request.dtype or promote(dtypes)
    base = request.base if request.base in group else None
    has_base = method.base != "ignored" and base is not None
    if len(group) == 1 and _passes_alone(request, has_base):
        return _Task(name, (first,), dtype, request.seed)
    if method.base == "required" and base is None:
        what = "base_index (or base)" if request.base is None else "the base's tensor"
        raise ValueError(f"{place}'{method.name}' needs {what}")
    if not _enough(request, place, len(group), has_base):
        return None
    order = [base, *(i for i in positions if i != base)] if has_base and base is not None else positions
    values = argument_values(method, request.parameters, request.ids, order, request.base)
    svc = values.pop("svc", None)
    tensors = tuple(group[i] for i in order)
    leaves = tuple(_leaf(name, i, group[i]) for i in order)
    held = guarded(method, name or "(unnamed)", len(order) - (has_base and method.form.space == "deltas"))
    only = rehearse(held, values)
    if only is not None:
        return _Task(name, (tensors[only],), dtype, request.seed)
    # The work finds the method by what stands here, and one that is not registered is found all the same.
    found: Any = method
    svc = svc if matrix_shape(tuple(first.shape)) else None
    apply = Apply(found, leaves, tuple(order), has_base, tuple(sorted(values.items())), svc=svc)
    return _Task(name, tensors, dtype, request.seed, apply, held)


def _leaf(name: str, position: int, value: Any) -> Read:
    dtype = dtype_of(value)
    shape = tuple(value.shape)
    size = 1
    for length in shape:
        size *= length
    return Read(position, TensorInfo(name, dtype, shape, "", -1, size * dtype.size))


def _check_alike(request: _Request, place: str, group: Group) -> list[DType]:
    """The element types of tensors that are alike otherwise; TypeError or ValueError if they are not."""
    first = next(iter(group.values()))
    dtypes = [dtype_of(value) for value in group.values()]
    for i, value in group.items():
        if is_torch(value) != is_torch(first):
            raise TypeError(f"{place}torch tensors and numpy arrays can't be merged with each other")
        if device_of(value) != device_of(first):
            raise ValueError(f"{place}inputs are on different devices: {device_of(first)}, {device_of(value)}")
        if tuple(value.shape) != tuple(first.shape):
            shapes = f"{list(first.shape)} and {list(value.shape)} (of {request.ids[i]!r})"
            raise ValueError(f"{place}shapes differ: {shapes}")
    if any(dtype.kind == "fp8" for dtype in dtypes):
        raise ValueError(f"{place}float8 means nothing without its scales; convert to a wider type first")
    return dtypes


def _check_identical(request: _Request, place: str, group: Group, dtypes: Sequence[DType]) -> None:
    (start, first), *others = sorted(group.items())
    for (i, value), dtype in zip(others, dtypes[1:], strict=True):
        if dtype != dtypes[0] or not bool((value == first).all()):
            raise ValueError(
                f"{place}{dtypes[0]} tensors are never averaged, and those of {request.ids[start]!r} and "
                f"{request.ids[i]!r} differ"
            )


def _passes_alone(request: _Request, has_base: bool) -> bool:
    method = request.method
    return (method.lone == "pass" and len(request.ids) > 1) or (method.base == "required" and has_base)


def _enough(request: _Request, place: str, count: int, has_base: bool) -> bool:
    method = request.method
    counted = count - (method.base == "optional" and has_base)
    if method.takes(counted):
        return True
    if method.lone == "skip" and count < len(request.ids):
        _LOG.warning("%stoo few models have it for '%s'; it is left out", place, method.name)
        return False
    many = f"{method.least}" if method.most == method.least else f"at least {method.least}"
    besides = {"required": ", the base included", "optional": " besides the base", "ignored": ""}[method.base]
    raise ValueError(f"{place}'{method.name}' takes {many} input(s){besides}, but this gives {counted}")


@lru_cache
def _kernels(device: str) -> Any:
    if device == "cpu":
        from mergekit.kernels import cpu

        return cpu
    from mergekit.kernels.accelerator import TorchKernels

    return TorchKernels(device)
