"""SVC: merged directions brought back to the length that the models gave them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit.methods.spectral import BLOCK, factors, matrix_shape, seconds, times

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WORKSPACE", "svc", "svc_seconds"]

WORKSPACE = 16.0
"""How many float32 copies of the tensor ``svc`` holds at most, beyond its arguments and the result."""


def svc_seconds(shape: tuple[int, ...], count: int) -> float:
    """About how long ``svc`` takes for a tensor and ``count`` models on two processors."""
    return seconds(shape, 1, products=count + 3)


def svc(merged: Tensor, x: list[Tensor], alpha: float) -> Tensor:
    """Singular value calibration of a merged delta (Li et al. 2026, arXiv 2602.05536, equations 17 to 23).

    Directions that task vectors have in common are counted several times in their sum. With merged = U S V^T, the
    responses of direction r are a_r = u_r^T merged and a_rt = u_r^T x_t, and s_rt = <a_r, a_rt> / |a_rt|^2 says how
    many times the response of model t is contained in the merged one. Each singular value is multiplied by
    gamma_r = T / sum_t max(alpha, s_rt). ``alpha`` must be positive: 1 only ever shrinks, less lets weak directions
    grow, up to 1 / alpha times; the paper proposes 1 / T, and 1 after TSV-M. A model without any response counts
    as s_rt = 0. Float32 [m, n] in and out, float64 between; tensors that are no matrices come back as they are, those
    of more than two axes are taken apart as ``spectral.matrix_shape`` says.

    Two equal task vectors are brought back to one:

    >>> import torch
    >>> x = torch.diag(torch.tensor([2.0, 1.0]))
    >>> svc(x + x, [x, x], 1.0)
    tensor([[2., 0.],
            [0., 1.]])
    """
    import torch

    shape = matrix_shape(tuple(merged.shape))
    if shape is None:
        return merged
    stacks = [t.reshape(shape) for t in (merged, *x)]
    return torch.stack([_calibrate(m, list(deltas), alpha) for m, *deltas in zip(*stacks, strict=True)]).reshape(
        merged.shape
    )


def _calibrate(merged: Tensor, x: list[Tensor], alpha: float) -> Tensor:
    """``svc`` of one matrix."""
    import torch

    lefts, values, rights = factors(merged, min(merged.shape))
    total = torch.zeros_like(values)
    for delta in x:
        # <u_r^T merged, u_r^T x_t> = s_r <v_r, u_r^T x_t>.
        dots, squares = torch.zeros_like(values), torch.zeros_like(values)
        for right, part in zip(torch.split(rights, BLOCK, dim=1), torch.split(delta, BLOCK, dim=1), strict=True):
            response = lefts.T.double() @ part.double()
            dots += (response * right).sum(dim=1)
            squares += response.square().sum(dim=1)
        present = squares > 0
        share = (values * dots / squares.where(present, torch.ones_like(squares))).masked_fill(~present, 0)
        total += share.clamp_min(alpha)
    return times(lefts.double() * (values * len(x) / total), rights)
