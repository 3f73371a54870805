"""WUDI: the task vector that disturbs each model least."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit.methods.spec import Integer, Real, Whole, method, once
from mergekit.methods.spectral import by_matrix, matrix_shape

if TYPE_CHECKING:
    from torch import Tensor

_DECAY = (0.9, 0.999)
_EPSILON = 1e-8


def _seconds(shape: tuple[int, ...], count: int) -> float:
    matrices = matrix_shape(shape)
    if matrices is None:
        return 0.0
    stack, rows, columns = matrices
    step = 2.0 * rows * columns * min(columns, 2 * rows * count)
    return stack * (300 * (step / 120e9 + rows * columns * 5e-9) + 4.0 * count * rows * columns * columns / 120e9)


@method(
    "wudi",
    title="WUDI-Merging",
    form=Whole(workspace=12.0, seconds=_seconds),
    base="required",
    models=(1, None),
    paper="Cheng et al. 2025, Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task "
    "Vectors",
    url="https://arxiv.org/abs/2503.08099",
    laws=("equal", "symmetric", "deltas"),
    params=[
        once("steps", Integer(0), 300, help="steps of Adam"),
        once("learning_rate", Real(0), 1e-5, help="how far a step goes, about, in each element"),
    ],
)
def wudi(x: list[Tensor], *, steps: int, learning_rate: float) -> Tensor:
    """A task vector m that disturbs the models' own as little as possible, found by gradient descent.

    It starts as the sum of the T task vectors and minimises sum_t |(m - x_t) x_t^T|^2 / |x_t|^2 (Frobenius norms) by
    ``steps`` steps of Adam (Kingma & Ba 2015; decay rates 0.9 and 0.999, epsilon 1e-8), as published. The sum over
    models in its gradient is taken once, as 2 (m A - B) with A = sum_t x_t^T x_t / |x_t|^2 and
    B = sum_t x_t x_t^T x_t / |x_t|^2, unless the matrix is so wide that products with each x_t take less time.
    float32. Tensors that are no matrices are averaged. The method is made for the weights of linear layers; embeddings
    are treated like them.

    >>> import torch
    >>> x = torch.diag(torch.tensor([3.0, 1.0]))
    >>> bool(wudi([x], steps=300, learning_rate=1e-5).equal(x))
    True
    """
    return by_matrix(x, lambda matrices: _descend(matrices, steps, learning_rate))


def _descend(x: list[Tensor], steps: int, rate: float) -> Tensor:
    import torch

    lengths = [delta.double().norm().float() for delta in x]
    # Each task vector twice: as it is, and with a length of one.
    active = [(delta, delta / length) for delta, length in zip(x, lengths, strict=True) if length != 0]
    merged = sum(x[1:], x[0].clone())
    rows, columns = merged.shape
    first, second = torch.zeros_like(merged), torch.zeros_like(merged)
    is_wide = columns > 2 * rows * len(active)
    if active and not is_wide:
        grams = [unit.T @ unit for _, unit in active]
        gram = sum(grams[1:], grams[0])
        pull = sum(delta @ square for (delta, _), square in zip(active, grams, strict=True))
    for step in range(1, steps + 1 if active else 1):
        if is_wide:
            gradient = 2 * sum(((merged - delta) @ unit.T) @ unit for delta, unit in active)
        else:
            gradient = 2 * (merged @ gram - pull)
        first = first.lerp(gradient, 1 - _DECAY[0])
        second = (_DECAY[1] * second).addcmul(gradient, gradient, value=1 - _DECAY[1])
        root = (second / (1 - _DECAY[1] ** step)).sqrt()
        merged = merged - rate / (1 - _DECAY[0] ** step) * first / (root + _EPSILON)
    return merged
