"""WUDI: the task vector that disturbs each model least."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from mergekit.methods.spec import Choice, Integer, Real, Whole, method, once
from mergekit.methods.spectral import by_matrix, gram, matrix_shape, times

if TYPE_CHECKING:
    from torch import Tensor

_DECAY = (0.9, 0.999)
_EPSILON = 1e-8
_WIDE = 4
"""How many times as many columns as rows make the square matrix of the columns too large to be held."""


def _seconds(shape: tuple[int, ...], count: int, *, solver: str, steps: int, **others: object) -> float:
    matrices = matrix_shape(shape)
    if matrices is None:
        return 0.0
    stack, rows, columns = matrices
    step = 2.0 * rows * columns * (2 * rows * count if columns > _WIDE * rows else columns)
    once = 4.0 * count * rows * columns * columns / 120e9
    if solver == "closed":
        small, large = sorted((rows * count, columns))
        # The Gram matrix and its factors; the pulls; and what they are brought back to.
        products = 2.0 * small * small * large + 4.0 * count * rows * rows * columns + 2.0 * rows * small * small
        return stack * (products + small**3 / 3) / 40e9
    return stack * (steps * (step / 120e9 + rows * columns * 5e-9) + once)


@method(
    "wudi",
    title="WUDI-Merging",
    form=Whole(workspace=30.0, seconds=_seconds),
    base="required",
    models=(1, None),
    paper="Cheng et al. 2025, Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task "
    "Vectors",
    url="https://arxiv.org/abs/2503.08099",
    laws=("equal", "symmetric"),
    params=[
        once(
            "solver",
            Choice(("adam", "closed")),
            "adam",
            help="adam as published, or closed: the exact solution with a ridge, which takes the time of a few steps",
        ),
        once("steps", Integer(0), 300, help="steps of Adam"),
        once("learning_rate", Real(0), 1e-5, help="how far a step of Adam goes, about, in each element"),
        once("ridge", Real(1e-6), 0.1, help="how strongly the closed solution is held to the sum of the task vectors"),
    ],
)
def wudi(x: list[Tensor], *, solver: str, steps: int, learning_rate: float, ridge: float) -> Tensor:
    """A task vector m that disturbs the models' own as little as possible.

    It minimises sum_t |(m - x_t) x_t^T|^2 / |x_t|^2 (Frobenius norms), starting from the sum of the T task vectors,
    by ``steps`` steps of Adam (Kingma & Ba 2015; decay rates 0.9 and 0.999, epsilon 1e-8) as published. The gradient
    is 2 (m A - B) with A = sum_t x_t^T x_t / |x_t|^2 and B = sum_t x_t x_t^T x_t / |x_t|^2.

    That loss has no single minimum where the task vectors leave directions out, and what Adam finds depends on where
    it stops. ``solver: closed`` makes both explicit: it adds r |m - sum_t x_t|^2, where r is ``ridge`` times the mean
    eigenvalue of A, so m = (B + r sum_t x_t) (A + r I)^-1. This form is ours, not the paper's; float64.

    Tensors that are no matrices are averaged. The method is made for the weights of linear layers, stored as
    [out, in]; embeddings are treated like them. Steps of Adam take minutes to hours for each matrix of a large model
    on processors.

    >>> import torch
    >>> x = torch.diag(torch.tensor([3.0, 1.0]))
    >>> bool(wudi([x], solver="adam", steps=300, learning_rate=1e-5, ridge=0.1).equal(x))
    True
    """
    if solver == "closed":
        return by_matrix(x, lambda matrices: _merge(matrices, partial(_solve, ridge=ridge)))
    return by_matrix(x, lambda matrices: _merge(matrices, partial(_descend, steps=steps, rate=learning_rate)))


def _merge(x: list[Tensor], find: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Tensor:
    """The sum S of the task vectors, plus what ``find`` adds to it.

    ``find`` gets the task vectors divided by their lengths, y_t, and p_t = (x_t - S) y_t^T. With R = sum_t p_t y_t half
    the loss's gradient at S + d is d A - R: nothing cancels beside S.
    """
    total = sum(x[1:], x[0])
    lengths = [delta.double().norm().float() for delta in x]
    units, pulls = [], []
    for delta, length in zip(x, lengths, strict=True):
        if length != 0:
            units.append(delta / length)
            pulls.append((delta - total).double() @ units[-1].T.double())
    return total + find(pulls, units) if units else total


def _rest(pulls: list[Tensor], units: list[Tensor]) -> Tensor:
    """R = sum_t p_t y_t, float32."""
    parts = [times(pull, unit) for pull, unit in zip(pulls, units, strict=True)]
    return sum(parts[1:], parts[0])


def _solve(pulls: list[Tensor], units: list[Tensor], ridge: float) -> Tensor:
    """The d of d (A + r I) = R, by the smaller of A [n, n] and the Gram matrix of all rows of the units [T m, T m]."""
    import torch

    columns = units[0].shape[1]
    by_rows = len(units) * units[0].shape[0] <= columns
    if by_rows:
        rows = torch.cat(units)
        square = gram(rows)
    else:
        square = gram(units[0].T)
        for unit in units[1:]:
            square += gram(unit.T)
    # Both have the same trace; A has n eigenvalues.
    square.diagonal().add_(ridge * square.diagonal().sum() / columns)
    if not bool(torch.isfinite(square).all()):
        return torch.full_like(units[0], math.nan)  # which the engine sees, and names the tensor
    root = torch.linalg.cholesky(square)
    del square
    if by_rows:
        # With Y all rows and P all pulls side by side, P Y (Y^T Y + r)^-1 = P (Y Y^T + r)^-1 Y.
        return times(torch.cholesky_solve(torch.cat(pulls, dim=1).T, root).T, rows)
    return torch.cholesky_solve(_rest(pulls, units).T.double(), root).T.float()


def _descend(pulls: list[Tensor], units: list[Tensor], steps: int, rate: float) -> Tensor:
    """The d that Adam reaches from zero."""
    import torch

    rest = _rest(pulls, units)
    is_wide = rest.shape[1] > _WIDE * rest.shape[0]
    square = None if is_wide else _square(units)
    found, first, second = (torch.zeros_like(rest) for _ in range(3))
    for step in range(1, steps + 1):
        slope = -rest
        if square is not None:
            slope = slope.addmm(found, square)
        else:
            for unit in units:
                slope = slope.addmm(found @ unit.T, unit)
        slope = 2 * slope
        first = first.lerp(slope, 1 - _DECAY[0])
        second = (_DECAY[1] * second).addcmul(slope, slope, value=1 - _DECAY[1])
        root = (second / (1 - _DECAY[1] ** step)).sqrt()
        found = found - rate / (1 - _DECAY[0] ** step) * first / (root + _EPSILON)
    return found


def _square(units: list[Tensor]) -> Tensor:
    """A = sum_t y_t^T y_t, float32."""
    total = units[0].T @ units[0]
    for unit in units[1:]:
        total.addmm_(unit.T, unit)
    return total
