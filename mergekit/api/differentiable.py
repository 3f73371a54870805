"""Merges that torch can differentiate: the same formulas, whole tensors at a time.

Coefficients of the ``span`` form are differentiated by the Gram matrix they come from, numerically, so that any
function serves. Selections, random masks and elected signs are those of the engine and count as constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit.dtypes import F32, DType
from mergekit.execute import run_works
from mergekit.execute.arrays import ArrayReader, ArraySink, empty
from mergekit.execute.merge_work import merge_work
from mergekit.execute.work import Job
from mergekit.kernels import cpu
from mergekit.methods import Elementwise, Method, Span, Sparse, SparseMerge, Whole
from mergekit.methods.svc import svc
from mergekit.planning.expression import Apply
from mergekit.planning.plan import OutputTensor

__all__ = ["converted", "merge_with_gradients"]

Values = Mapping[str, Any]


def converted(tensor: Tensor, dtype: DType) -> Tensor:
    """A new tensor in another element type."""
    return tensor.to(getattr(torch, dtype.name), copy=True)


def merge_with_gradients(
    method: Method, apply: Apply, tensors: Sequence[Tensor], name: str, seed: int, dtype: DType
) -> Tensor:
    """The result of a method on ``tensors`` (the base first if ``apply.has_base``), with its graph.

    Arithmetic is float32, float64 if an input is. Takes memory for several copies of all inputs.
    """
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    inputs = [tensor.to(wide) for tensor in tensors]
    values = dict(apply.parameters)
    form = method.form
    origin = inputs[0] if apply.has_base and form.space == "deltas" else None
    x = inputs if origin is None else [value - origin for value in inputs[1:]]
    if isinstance(form, Span):
        result = _span(method, form, x, values)
    elif isinstance(form, Sparse):
        result = _sparse(method, apply, x, name, seed)
    elif isinstance(form, Elementwise):
        result = _elementwise(method, form, x, values)
    else:
        assert isinstance(form, Whole)
        result = method.function(x, **values)
    if apply.svc is not None:
        result = svc(result, x, apply.svc)
    return converted(result if origin is None else origin + result, dtype)


def _span(method: Method, form: Span, x: Sequence[Tensor], values: Values) -> Tensor:
    """sum_i c_i x_i, the coefficients from the Gram matrix of the vectors."""
    shape = x[0].shape
    kind = form.vectors(**values) if form.vectors and len(shape) > 1 else "tensor"
    stacked = torch.stack([_vectors(value, kind) for value in x], dim=1)  # [vectors, n, length]
    if not form.gram:
        chosen = torch.as_tensor(np.asarray(method.function(None, **values), np.float64)).to(stacked)
        return torch.einsum("n,vnl->vl", chosen, stacked).reshape(shape)
    exact = stacked.double()
    gram = exact @ exact.mT
    many = kind != "tensor"
    coefficients: Any = _Coefficients.apply
    chosen = coefficients(gram if many else gram[0], lambda g: method.function(g, **values))
    result = torch.einsum("vn,vnl->vl", (chosen if many else chosen[None]).to(stacked), stacked)
    return (result.T if kind == "columns" else result).reshape(shape)


def _vectors(value: Tensor, kind: str) -> Tensor:
    """The vectors that a tensor consists of, [vectors, length]."""
    if kind == "tensor":
        return value.reshape(1, -1)
    return value.reshape(-1, value.shape[-1]) if kind == "rows" else value.reshape(value.shape[0], -1).T


class _Coefficients(torch.autograd.Function):
    """``function`` of a Gram matrix, float64 [..., n, n] -> [..., n]; its derivative by central differences."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        values = _finite(gram)
        ctx.values, ctx.function = values, function
        return torch.as_tensor(np.array(function(values), np.float64)).to(gram.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        gram, function = ctx.values, ctx.function
        outer = grads[0].cpu().numpy()
        result = np.zeros_like(gram)
        steps = _steps(gram)
        n = gram.shape[-1]
        for i in range(n):
            for j in range(i, n):
                up, down = gram.copy(), gram.copy()
                for a, b in dict.fromkeys([(i, j), (j, i)]):
                    up[..., a, b] += steps[..., i, j]
                    down[..., a, b] -= steps[..., i, j]
                change = np.asarray(function(up), np.float64) - np.asarray(function(down), np.float64)
                width = np.where(steps[..., i, j] > 0, 2 * steps[..., i, j], 1)
                slope = (outer * change).sum(axis=-1) / width
                # The two entries of a pair change together, so each has half of the slope.
                result[..., i, j] += slope / 2
                result[..., j, i] += slope / 2
        return torch.as_tensor(result).to(grads[0].device), None


def _finite(gram: Tensor) -> np.ndarray:
    values = np.array(gram.detach().cpu().numpy(), np.float64)
    return values if np.isfinite(values).all() else np.zeros_like(values)


def _steps(gram: np.ndarray) -> np.ndarray:
    """How far to move each entry: little against the lengths, and less the closer the vectors come to dependence.

    Beyond that the matrix would be nobody's Gram matrix, and the function's guards would answer for it.
    """
    lengths = np.sqrt(np.maximum(np.diagonal(gram, axis1=-2, axis2=-1), 0))
    products = lengths[..., :, None] * lengths[..., None, :]
    cosines = gram / np.where(products > 0, products, 1)
    np.einsum("...ii->...i", cosines)[...] = 1
    slack = np.linalg.eigvalsh(cosines)[..., :1, None]
    steps: np.ndarray = products * np.clip(1e-3 * slack, 1e-12, 1e-6)
    return steps


def _sparse(method: Method, apply: Apply, deltas: Sequence[Tensor], name: str, seed: int) -> Tensor:
    """factor * combine(weight_i * scale_i * keep_i(delta_i)); see ``methods.rules.SparseMerge``."""
    merge: SparseMerge = method.function(**dict(apply.parameters))
    total = torch.zeros_like(deltas[0])
    elected, parts = torch.zeros_like(deltas[0]), []
    shares = _shares_kept(method, apply, merge, deltas, name, seed)
    for delta, share, weight in zip(deltas, shares, merge.weight, strict=True):
        kept = delta * share
        if merge.rescale == "l1":
            before, after = delta.abs().sum(dtype=torch.float64), kept.abs().sum(dtype=torch.float64)
            is_fair = (before != 0) & (after != 0)  # true of what is not finite, which must show in the result
            kept = kept * torch.where(is_fair, before / torch.where(is_fair, after, 1.0), 1.0).to(kept.dtype)
        part = kept * weight
        vote = (part if merge.elect == "weighted" else kept).detach()
        elected = elected + vote
        parts.append((part, vote, abs(weight)))
    if not merge.consensus:
        total = torch.stack([part for part, _, _ in parts]).sum(dim=0) if parts else total
        weights = sum(merge.weight)
        return total * (merge.factor / weights if merge.normalize and abs(weights) >= 1e-8 else merge.factor)
    mass = torch.zeros_like(total)
    for part, vote, weight in parts:
        # As in the kernels NaN agrees with any sign: it must show in the result.
        agrees = ~torch.where(elected < 0, vote >= 0, vote <= 0)
        total = total + torch.where(agrees, part, 0.0)
        mass = mass + agrees * weight
    return merge.factor * (total / torch.where(mass > 0, mass, 1.0) if merge.normalize else total)


def _shares_kept(
    method: Method, apply: Apply, merge: SparseMerge, deltas: Sequence[Tensor], name: str, seed: int
) -> list[Tensor]:
    """What each entry of each delta is multiplied by: 0 if it is dropped, else 1 (or what makes good for others).

    The engine is asked, one model at a time: by the sum in which only that model has a weight.
    """
    probes = [_without_zeros(delta.detach().to(torch.float32)) for delta in deltas]
    rescale = "density" if merge.rescale == "density" else "none"
    found = []
    for m, (probe, delta) in enumerate(zip(probes, deltas, strict=True)):
        weight = tuple(float(i == m) for i in range(len(probes)))
        lone = replace(merge, weight=weight, consensus=False, normalize=False, rescale=rescale, factor=1.0)
        asked: Any = replace(method, function=lambda lone=lone, **parameters: lone)
        made, data = empty(probe, F32)
        plain = replace(apply, method=asked, scale=1.0, svc=None)
        output = OutputTensor(name, tuple(probe.shape), F32, "", 0, data.size, plain)
        readers = tuple(map(ArrayReader, (torch.zeros_like(probe), *probes)))
        work = merge_work(plain, Job(output, readers, cpu, ArraySink(data), seed=seed))
        run_works(iter([work]), threads=1)
        found.append((made.to(probe.device) / probe).to(delta.dtype))
    return found


def _without_zeros(delta: Tensor) -> Tensor:
    """``delta`` with something smaller than anything else where it is zero: what is kept can then be seen there."""
    magnitude = delta.abs()
    least = magnitude[magnitude > 0].min() / 2 if (magnitude > 0).any() else 1.0
    return torch.where(magnitude > 0, delta, least)


def _elementwise(method: Method, form: Elementwise, x: Sequence[Tensor], values: Values) -> Tensor:
    """The function of one chunk that is the whole tensor, after selection and sums."""
    shape = x[0].shape
    flat = tuple(value.reshape(-1) for value in x)
    if form.key and form.keep:
        keys = form.key(torch, tuple(value.detach().to(torch.float32) for value in flat), **values)
        count = form.keep(int(torch.count_nonzero(keys)), keys.numel(), **values)
        if count is not None:
            order = torch.sort(keys, descending=True, stable=True).indices
            kept = torch.zeros_like(keys, dtype=torch.bool)
            kept[order[: max(0, count)]] = True
            flat = tuple(torch.where(kept, value, 0.0) for value in flat)
    if form.measure is None:
        result: Tensor = method.function(torch, flat, **values)
        return result.reshape(shape)
    sums = form.measure(torch, tuple(value.double() for value in flat), **values)
    result = method.function(torch, flat, sums.detach().cpu().numpy(), **values)
    if sums.requires_grad:
        exact = tuple(value.detach().double() for value in flat)
        by_sums: Any = _BySums.apply
        result = result + by_sums(sums, result.detach(), lambda s: method.function(torch, exact, s, **values))
    return result.reshape(shape)


class _BySums(torch.autograd.Function):
    """Nothing, with the derivative of ``function`` by its sums, float64 [m]: by central differences."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, result: Tensor, function: Callable[[np.ndarray], Tensor]) -> Tensor:
        ctx.values, ctx.function = sums.detach().cpu().numpy(), function
        return torch.zeros_like(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        sums, outer = ctx.values, grads[0].double()
        slopes = np.zeros_like(sums)
        for k in range(len(sums)):
            step = 1e-5 * (abs(sums[k]) or float(np.abs(sums).max()) or 1.0)
            up, down = sums.copy(), sums.copy()
            up[k] += step
            down[k] -= step
            slopes[k] = float((outer * (ctx.function(up) - ctx.function(down))).sum()) / (2 * step)
        return torch.as_tensor(slopes).to(outer.device), None, None
