"""TSV-Merge: the leading singular vectors of each task, made orthogonal to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit.methods.spec import Real, Whole, method, once
from mergekit.methods.spectral import by_matrix, factors, inverse_root, seconds, times

if TYPE_CHECKING:
    from torch import Tensor


def _seconds(shape: tuple[int, ...], count: int, **parameters: object) -> float:
    return seconds(shape, count, roots=2, products=count + 2)


@method(
    "tsv_m",
    title="TSV-Merge",
    form=Whole(workspace=18.0, seconds=_seconds),
    base="required",
    models=(1, None),
    paper="Gargiulo et al. 2024, Task Singular Vectors: Reducing Task Interference in Model Merging",
    url="https://arxiv.org/abs/2412.00081",
    laws=("equal", "symmetric", "deltas"),
    params=[once("lambda", Real(), 1.0, help="factor on the merged task vector (alpha in the paper)")],
)
def tsv_m(x: list[Tensor], *, lambda_: float) -> Tensor:
    """The leading singular vectors of the models' task vectors, made orthogonal to each other and put together.

    Of the task vector U_t S_t V_t^T of each of T models the leading floor(rank / T) directions are kept, one at least.
    U = [U_1 .. U_T] and V = [V_1 .. V_T] are replaced by the nearest matrices with orthonormal columns (P Q^T of their
    singular value decomposition P D Q^T); the result is lambda U S V^T, with S = diag(S_1 .. S_T). Tensors that are
    no matrices are averaged, and multiplied by lambda, too.

    Where models share a direction exactly, no nearest matrix exists: there the pseudo-inverse is used (see
    ``spectral.inverse_root``), so a direction that two models share counts once.

    >>> import torch
    >>> x = [torch.diag(torch.tensor(d)) for d in ([3.0, 1.0], [1.0, 2.0])]
    >>> tsv_m(x, lambda_=1.0)
    tensor([[3., 0.],
            [0., 2.]])
    """
    return lambda_ * by_matrix(x, _merge)


def _merge(x: list[Tensor]) -> Tensor:
    import torch

    rank = max(1, min(x[0].shape) // len(x))
    lefts, values, rights = zip(*(factors(delta, rank) for delta in x), strict=True)
    u, s, v = torch.cat(lefts, dim=1), torch.cat(values), torch.cat(rights)
    core = (inverse_root(u.T) * s) @ inverse_root(v)
    return times(u.double() @ core, v)
