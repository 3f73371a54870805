"""Four merge methods, one of each form; docs/extending.md explains them."""

import numpy as np

from mergekit.methods import Elementwise, Real, Span, Sparse, SparseMerge, TopMagnitude, Whole, each, method, once


@method(
    "equal_voices",
    form=Span("deltas", gram=True),
    base="required",
    models=(2, None),
    params=[once("lambda", Real(), 1.0, help="factor on the merged task vector")],
)
def equal_voices(gram, *, lambda_):
    """The mean of the task vectors, each brought to their mean length first.

    >>> equal_voices(np.diag([1.0, 9.0]), lambda_=1.0).round(3)
    array([1.   , 0.333])
    """
    lengths = np.sqrt(np.diagonal(gram))
    return lambda_ * lengths.mean() / len(lengths) / np.where(lengths > 0, lengths, 1)


@method(
    "loudest",
    form=Sparse(),
    base="required",
    params=[
        each("weight", Real(), 1.0, help="coefficient of the model's task vector"),
        each("density", Real(0, 1), 0.1, help="fraction of the task vector's entries to keep"),
    ],
)
def loudest(*, weight, density):
    """The largest entries of each task vector, added where their signs agree."""
    return SparseMerge(
        keep=tuple(TopMagnitude(share) for share in density),
        weight=weight,
        consensus=True,
        normalize=False,
        rescale="none",
        factor=1.0,
    )


def squares(xp, x, *, k):
    """For each task vector the sum of its squares, then the number of its entries that are not zero."""
    return xp.stack([xp.sum(d * d) for d in x] + [xp.sum(xp.asarray(d != 0, dtype=xp.float32)) for d in x])


@method(
    "clipped_mean",
    form=Elementwise(measure=squares),
    base="required",
    params=[once("k", Real(0), 3.0, help="how many root mean squares an entry may be")],
)
def clipped_mean(xp, x, sums, *, k):
    """The mean of the task vectors, whose outliers are cut to k times the root of their mean square."""
    squared, counts = sums[: len(x)].tolist(), sums[len(x) :].tolist()
    total = 0.0
    for delta, square, count in zip(x, squared, counts, strict=True):
        limit = k * (square / max(count, 1)) ** 0.5
        total = total + xp.clip(delta, -limit, limit)
    return total / len(x)


@method(
    "low_rank_mean",
    form=Whole(workspace=3),
    base="required",
    params=[once("share", Real(0, 1), 0.5, help="fraction of the singular values to keep")],
)
def low_rank_mean(x, *, share):
    """The mean of the task vectors, of matrices only its leading singular vectors."""
    mean = sum(x[1:], x[0]) / len(x)
    if mean.ndim != 2:
        return mean
    u, s, v = mean.svd()
    rank = max(1, round(share * len(s)))
    return u[:, :rank] * s[:rank] @ v[:, :rank].T
