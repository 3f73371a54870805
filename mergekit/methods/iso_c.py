"""Iso-C: the sum of the task vectors with all singular values alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit.methods.spec import Real, Whole, method, once
from mergekit.methods.spectral import RESOLVED, by_matrix, left, seconds, times

if TYPE_CHECKING:
    from torch import Tensor


def _seconds(shape: tuple[int, ...], count: int, **parameters: object) -> float:
    return seconds(shape, 1, products=2)


@method(
    "iso_c",
    title="Iso-C",
    form=Whole(workspace=14.0, seconds=_seconds),
    base="required",
    models=(1, None),
    paper="Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    url="https://arxiv.org/abs/2502.04959",
    without=("svc",),  # all its singular values are equal, so its directions are arbitrary
    laws=("equal", "symmetric", "deltas"),
    params=[once("lambda", Real(), 1.0, help="factor on the merged task vector (alpha in the paper)")],
)
def iso_c(x: list[Tensor], *, lambda_: float) -> Tensor:
    """The sum of the models' task vectors, its singular values replaced by their mean.

    With sum_t x_t = U S V^T and r the smaller side of the matrix, the result is lambda mean(s_1 .. s_r) U V^T. Tensors
    that are no matrices are averaged, and multiplied by lambda, too.

    All directions come out equally strong, those that hold only noise included. Directions that are absent (singular
    values below 1e-6 of the largest) stay so, but count in the mean as the zeros that they are: task vectors of low
    rank (LoRA) come out short, and stored in 16 bits they have full rank, which is mostly rounding. The method is made
    for models that were fine-tuned whole.

    >>> import torch
    >>> x = [torch.diag(torch.tensor(d)) for d in ([3.0, 1.0], [0.0, -3.0])]
    >>> iso_c(x, lambda_=1.0).round(decimals=4)
    tensor([[ 2.5000,  0.0000],
            [ 0.0000, -2.5000]])
    """
    return lambda_ * by_matrix(x, _merge)


def _merge(x: list[Tensor]) -> Tensor:
    total = sum(x[1:], x[0])
    if total.shape[0] > total.shape[1]:
        return _merge([total.T]).T
    values, vectors = left(total)
    inverse = (1 / values).masked_fill(values <= values[0] * RESOLVED, 0)
    return times(values.mean() * (vectors * inverse) @ vectors.T, total)
