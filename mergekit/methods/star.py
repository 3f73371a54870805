"""STAR: truncated spectra of the same nuclear norm, averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit.methods.spec import Real, Whole, method, once
from mergekit.methods.spectral import by_matrix, left, mean, seconds, times

if TYPE_CHECKING:
    from torch import Tensor


def _seconds(shape: tuple[int, ...], count: int, **parameters: object) -> float:
    return seconds(shape, count, products=2 * count)


@method(
    "star",
    title="STAR",
    form=Whole(workspace=14.0, seconds=_seconds),
    base="required",
    models=(1, None),
    paper="Lee et al. 2025, STAR: Spectral Truncation and Rescale for Model Merging",
    url="https://arxiv.org/abs/2502.10339",
    laws=("equal", "symmetric", "deltas"),
    params=[once("eta", Real(0, 100), 40.0, help="per cent of each task vector's nuclear norm to keep, then restored")],
)
def star(x: list[Tensor], *, eta: float) -> Tensor:
    """The mean of the models' task vectors, each cut to its leading directions and brought back to its nuclear norm.

    Of a task vector U S V^T the fewest leading directions are kept whose singular values sum to ``eta`` per cent of
    the sum of all, one at least. What is kept is multiplied by the ratio of these sums. Tensors that are no matrices
    are averaged as they are.

    >>> import torch
    >>> star([torch.diag(torch.tensor([3.0, 1.0]))], eta=40.0)
    tensor([[4., 0.],
            [0., 0.]])
    """
    return by_matrix(x, lambda matrices: mean([_cut(m, eta / 100) for m in matrices]))


def _cut(x: Tensor, share: float) -> Tensor:
    """One task vector, cut and rescaled."""
    if x.shape[0] > x.shape[1]:
        return _cut(x.T, share).T
    values, vectors = left(x)
    sums = values.cumsum(0)
    rank = min(int((sums < share * sums[-1]).sum()) + 1, len(values))
    kept = vectors[:, :rank]
    scale = (sums[-1] / sums[rank - 1]).where(sums[-1] > 0, sums[-1])
    return times(scale * kept @ kept.T, x)
