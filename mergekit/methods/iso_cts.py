"""Iso-CTS: common and task-specific directions, all equally strong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit.methods.spec import Real, Whole, method, once
from mergekit.methods.spectral import RESOLVED, by_matrix, factors, inverse_root, seconds, times

if TYPE_CHECKING:
    from torch import Tensor


def _seconds(shape: tuple[int, ...], count: int, **parameters: object) -> float:
    return seconds(shape, 1 + count, roots=2, products=3 * count + 3)


@method(
    "iso_cts",
    title="Iso-CTS",
    form=Whole(workspace=18.0, seconds=_seconds),
    base="required",
    models=(1, None),
    paper="Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    url="https://arxiv.org/abs/2502.04959",
    without=("svc",),  # all its singular values are equal, so its directions are arbitrary
    laws=("equal", "symmetric", "deltas"),
    params=[
        once("lambda", Real(), 1.0, help="factor on the merged task vector (alpha in the paper)"),
        once("common_space_fraction", Real(0, 1), 0.8, help="share of the directions that the models have in common"),
    ],
)
def iso_cts(x: list[Tensor], *, lambda_: float, common_space_fraction: float) -> Tensor:
    """Common directions of the models' task vectors and some of each model's own, all equally strong.

    Of the r directions of a matrix, s = round((r - floor(fraction r)) / T) are each model's own and k = r - T s
    common: the leading k of the sum of the T task vectors, U_c S_c V_c^T, and the leading s of each
    x_t - U_c U_c^T x_t. The left vectors of all of them together, and the right ones, are replaced by the nearest
    orthonormal ones (as in TSV-Merge); the result is lambda times the mean of all r singular values times U V^T.
    Tensors that are no matrices are averaged, and multiplied by lambda, too.

    Directions that are absent (singular values below 1e-6 of the largest) stay so, but count in the mean as the zeros
    that they are; see ``iso_c`` on task vectors of low rank.

    >>> import torch
    >>> x = [torch.diag(torch.tensor(d)) for d in ([3.0, 1.0], [1.0, 0.0])]
    >>> iso_cts(x, lambda_=1.0, common_space_fraction=1.0).round(decimals=4)
    tensor([[2.5000, 0.0000],
            [0.0000, 2.5000]])
    """
    return lambda_ * by_matrix(x, lambda matrices: _merge(matrices, common_space_fraction))


def _merge(x: list[Tensor], fraction: float) -> Tensor:
    import torch

    rank = min(x[0].shape)
    own = min(round((rank - int(rank * fraction)) / len(x)), rank // len(x))
    common = factors(sum(x[1:], x[0]), rank - own * len(x))
    found = [common]
    if own:
        # What float32 leaves of directions that were taken away is none of the model's own.
        found += [factors(_without(delta, common[0]), own, RESOLVED * float(delta.detach().norm())) for delta in x]
    lefts, values, rights = zip(*found, strict=True)
    u, s, v = torch.cat(lefts, dim=1), torch.cat(values), torch.cat(rights)
    return times(s.mean() * u.double() @ inverse_root(u.T) @ inverse_root(v), v)


def _without(x: Tensor, directions: Tensor) -> Tensor:
    """What of ``x`` is orthogonal to the columns of ``directions``."""
    return x - times(directions.double(), times(directions.T.double(), x))
