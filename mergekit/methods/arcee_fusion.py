"""Arcee Fusion: take over the changes that stand out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergekit.methods.spec import Whole, method

if TYPE_CHECKING:
    from torch import Tensor

_FLOOR = 1e-8
_BLOCK = 1 << 18


def _seconds(shape: tuple[int, ...], count: int, **parameters: object) -> float:
    return 4e-7 * math.prod(shape)


@method(
    "arcee_fusion",
    title="Arcee Fusion",
    form=Whole("weights", workspace=10.0, seconds=_seconds),
    base="required",
    models=(2, 2),
    lone="pass",
    paper="Arcee AI 2024, Arcee Fusion",
    url="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
    laws=("equal",),
    params=[],
)
def arcee_fusion(x: list[Tensor]) -> Tensor:
    """The entries of a second model that differ most from the base's, put in their place.

    An entry's importance is |p - q| K, where K is the Kullback-Leibler divergence sum P ln(P / Q) of its row, with
    P = softmax(p) + 1e-8 of the second model's row and Q = softmax(q) + 1e-8 of the base's. Entries whose importance
    is at least Q2 + 1.5 (Q3 - Q1) are taken over, with Q1, Q2, Q3 the quartiles over the whole tensor. A row runs
    along the last axis; a tensor without rows is one.

    The divergence is computed in float64, since rows of weights differ by little. Quartiles are exact: the elements
    of rank floor(share * (n - 1)).

    >>> import torch
    >>> arcee_fusion([torch.zeros(6), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 5.0])])
    tensor([0., 0., 0., 0., 0., 5.])
    """
    base, model = (t.reshape(-1, t.shape[-1] if t.ndim else 1) for t in x)
    if not base.numel():
        return x[0].clone()
    importance = _importance(base, model)
    q1, q2, q3 = (_quantile(importance, share) for share in (0.25, 0.5, 0.75))
    threshold = q2 + 1.5 * (q3 - q1)
    # Written so that NaN is taken over: it must show in the result, not vanish.
    return model.where(~(importance < threshold), base).reshape(x[0].shape)


def _importance(base: Tensor, model: Tensor) -> Tensor:
    """|p - q| K of each entry, float64."""
    import torch

    rows = max(1, _BLOCK // base.shape[1])
    parts = []
    for q, p in zip(torch.split(base, rows), torch.split(model, rows), strict=True):
        share_p, share_q = ((t.double().softmax(dim=1) + _FLOOR) for t in (p, q))
        divergence = (share_p * (share_p / share_q).log()).sum(dim=1, keepdim=True)
        parts.append((p.double() - q).abs() * divergence)
    return torch.cat(parts)


def _quantile(values: Tensor, share: float) -> Tensor:
    """The element of rank floor(share * (n - 1))."""
    return values.reshape(-1).kthvalue(math.floor(share * (values.numel() - 1)) + 1).values
