"""What the spectral methods share: tensors as matrices, and their singular values and vectors.

Singular vectors come from the eigenvectors of the Gram matrix of the smaller side, in float64: several times faster
than a singular value decomposition in float32, and more exact. What float64 resolves of a matrix squared are singular
values down to about 1e-7 of the largest; those below ``RESOLVED`` of it count as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BLOCK",
    "RESOLVED",
    "by_matrix",
    "factors",
    "gram",
    "inverse_root",
    "left",
    "matrix_shape",
    "mean",
    "seconds",
    "times",
]

RESOLVED = 1e-6
"""Singular values below this share of the largest count as zero, and their directions as absent."""
_SHARED = 1e-10
"""Eigenvalues below this share of the largest count as zero where sets of directions are made orthogonal."""
BLOCK = 4096
"""Columns that are held in float64 at once."""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """How a tensor is taken as matrices: (how many, rows, columns); None for one that is no matrix.

    Three axes are a stack of matrices, as experts are stored, where each has two rows and columns or more; other
    tensors of three axes or more (convolutions) are one matrix with a row for each index of the first axis.

    >>> [matrix_shape(shape) for shape in [(8, 4), (16, 8, 4), (8, 1, 4), (8,), (8, 1)]]
    [(1, 8, 4), (16, 8, 4), (1, 8, 4), None, None]
    """
    if len(shape) == 3 and min(shape[1:]) > 1 and shape[0] > 0:
        return shape[0], shape[1], shape[2]
    if len(shape) < 2 or min(rows_columns := (shape[0], math.prod(shape[1:]))) < 2:
        return None
    return (1, *rows_columns)


def by_matrix(x: list[Tensor], function: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """``function`` on the matrices that the tensors are made of; the mean of tensors that are no matrices."""
    import torch

    shape = matrix_shape(tuple(x[0].shape))
    if shape is None:
        return mean(x)
    stacks = [t.reshape(shape) for t in x]
    if shape[0] == 1:
        return function([s[0] for s in stacks]).reshape(x[0].shape)
    return torch.stack([function([s[i] for s in stacks]) for i in range(shape[0])]).reshape(x[0].shape)


def mean(x: list[Tensor]) -> Tensor:
    """The mean of tensors."""
    return sum(x[1:], x[0]) / len(x)


def times(a: Tensor, x: Tensor) -> Tensor:
    """The product of ``a`` (float64 [k, m]) and ``x`` (float32 [m, n]) in float64, rounded to float32."""
    product = x.new_empty((a.shape[0], x.shape[1]))
    for start in range(0, x.shape[1], BLOCK):
        product[:, start : start + BLOCK] = a @ x[:, start : start + BLOCK].double()
    return product


def gram(x: Tensor) -> Tensor:
    """x x^T of a float32 [m, n], float64 [m, m]."""
    import torch

    total = x.new_zeros((x.shape[0], x.shape[0]), dtype=torch.float64)
    for part in torch.split(x, BLOCK, dim=1):
        wide = part.double()
        total.addmm_(wide, wide.T)
    return total


def left(x: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, falling, and left singular vectors of a matrix with no more rows than columns.

    float64 [m] and [m, m]. The vectors of values that count as zero are some basis of the rest of the space. Of a
    matrix that is not finite both are NaN.
    """
    import torch

    square = gram(x)
    if not bool(torch.isfinite(square).all()):
        return torch.full_like(square[0], math.nan), torch.full_like(square, math.nan)
    values, vectors = torch.linalg.eigh(square)
    return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def factors(x: Tensor, rank: int, least: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading left vectors [m, rank], singular values (float64), right vectors [rank, n] of any matrix.

    Vectors are float32. Values that count as zero, or are at most ``least``, are zero, and so are their vectors.
    """
    if x.shape[0] > x.shape[1]:
        right, values, lefts = factors(x.T, rank, least)
        return lefts.T, values, right.T
    values, vectors = left(x)
    threshold = values[0].mul(RESOLVED).clamp_min(least)
    values, vectors = values[:rank], vectors[:, :rank]
    absent = values <= threshold
    inverse = (1 / values.masked_fill(absent, 1)).masked_fill(absent, 0)
    rights = times(inverse[:, None] * vectors.T, x)
    return vectors.masked_fill(absent, 0).float(), values.masked_fill(absent, 0), rights


def inverse_root(vectors: Tensor) -> Tensor:
    """(x x^T)^(-1/2) of vectors x [k, n], float64 [k, k]: times x it is the nearest set of orthonormal vectors.

    That is the Procrustes solution P Q^T of x = P S Q^T. Directions that vectors share exactly have no nearest set:
    there it is the pseudo-inverse, which leaves one vector where there were several.
    """
    import torch

    values, basis = torch.linalg.eigh(gram(vectors).nan_to_num())
    inverse = values.clamp_min(1e-300).rsqrt().masked_fill(values <= values[-1] * _SHARED, 0)
    root: Tensor = (basis * inverse) @ basis.T
    return root


def seconds(
    shape: tuple[int, ...], decompositions: float, roots: float = 0.0, products: float = 0.0, rate: float = 40e9
) -> float:
    """About how long a number of decompositions of a tensor takes on two processors.

    ``decompositions``: calls of ``left``; ``roots``: calls of ``inverse_root``, ``products``: other products of
    matrices with a matrix of its smaller side.
    """
    matrices = matrix_shape(shape)
    if matrices is None:
        return 0.0
    count, small, large = matrices[0], min(matrices[1:]), max(matrices[1:])
    product, eigen = 2.0 * small * small * large, 9.0 * small**3
    return count * ((decompositions + roots + products) * product + (decompositions + roots) * eigen) / rate
