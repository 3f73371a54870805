"""The methods of whole tensors in plain float64 NumPy, from dense singular value decompositions and literal loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from oracles import Array

Matrices = list[Array]


def per_matrix(deltas: Matrices, function: Callable[[Matrices], Array]) -> Array:
    """``function`` on each matrix of a stack, on a convolution as [out, rest]; the mean of vectors."""
    shape = deltas[0].shape
    if len(shape) == 3 and shape[1] > 1 and shape[2] > 1:
        return np.stack([function([d[i] for d in deltas]) for i in range(shape[0])])
    flat = [d.reshape(shape[0], -1) if len(shape) > 1 else d for d in deltas]
    if len(shape) < 2 or 1 in flat[0].shape:
        return sum(deltas) / len(deltas)
    return function(flat).reshape(shape)


def svd(x: Array) -> tuple[Array, Array, Array]:
    """U, s, V^T."""
    return np.linalg.svd(x, full_matrices=False)


def nearest(x: Array) -> Array:
    """The matrix with orthonormal rows or columns that is nearest to ``x``."""
    u, _, v = svd(x)
    return u @ v


def tsv_m(deltas: Matrices, lambda_: float = 1.0) -> Array:
    """Leading directions of each delta, made orthogonal."""

    def merge(x: Matrices) -> Array:
        rank = max(1, min(x[0].shape) // len(x))
        parts = [svd(d) for d in x]
        u = np.hstack([p[0][:, :rank] for p in parts])
        s = np.hstack([p[1][:rank] for p in parts])
        v = np.vstack([p[2][:rank] for p in parts])
        return nearest(u) * s @ nearest(v)

    return lambda_ * per_matrix(deltas, merge)


def iso_c(deltas: Matrices, lambda_: float = 1.0) -> Array:
    """All singular values of the sum replaced by their mean."""

    def merge(x: Matrices) -> Array:
        u, s, v = svd(sum(x))
        return s.mean() * u @ v

    return lambda_ * per_matrix(deltas, merge)


def iso_cts(deltas: Matrices, lambda_: float = 1.0, fraction: float = 0.8) -> Array:
    """Common directions of the sum and each delta's own, all with the mean of the singular values."""

    def merge(x: Matrices) -> Array:
        rank, count = min(x[0].shape), len(x)
        own = min(round((rank - int(rank * fraction)) / count), rank // count)
        common = rank - own * count
        u, s, v = (part[..., :common] if i < 2 else part[:common] for i, part in enumerate(svd(sum(x))))
        lefts, values, rights = [u], [s], [v]
        for d in x:
            uo, so, vo = svd(d - u @ (u.T @ d))
            lefts.append(uo[:, :own])
            values.append(so[:own])
            rights.append(vo[:own])
        return np.concatenate(values).mean() * nearest(np.hstack(lefts)) @ nearest(np.vstack(rights))

    return lambda_ * per_matrix(deltas, merge)


def star(deltas: Matrices, eta: float = 40.0) -> Array:
    """Truncated, rescaled to the same nuclear norm, averaged."""

    def cut(x: Array) -> Array:
        u, s, v = svd(x)
        rank = next(r for r in range(1, len(s) + 1) if s[:r].sum() >= eta / 100 * s.sum() * (1 - 1e-12))
        return u[:, :rank] * (s[:rank] * s.sum() / s[:rank].sum()) @ v[:rank]

    return per_matrix(deltas, lambda x: sum(cut(d) for d in x) / len(x))


def svc(merged: Array, deltas: Matrices, alpha: float) -> Array:
    """Singular values divided by how often the deltas are contained in them, direction by direction."""

    def calibrate(x: Matrices) -> Array:
        whole, *others = x
        u, s, v = svd(whole)
        result = np.zeros_like(whole)
        for r in range(len(s)):
            response = u[:, r] @ whole
            shares = [(response @ (u[:, r] @ d)) / ((u[:, r] @ d) @ (u[:, r] @ d)) for d in others]
            gamma = len(others) / sum(max(alpha, share) for share in shares)
            result += gamma * s[r] * np.outer(u[:, r], v[r])
        return result

    shape = merged.shape
    if len(shape) < 2 or 1 in merged.reshape(shape[0], -1).shape:
        return merged
    return per_matrix([merged, *deltas], calibrate)


def wudi_loss(merged: Array, deltas: Matrices) -> float:
    """What WUDI minimises."""
    return sum(float((((merged - d) @ d.T) ** 2).sum() / (d**2).sum()) for d in deltas)


def wudi(deltas: Matrices, steps: int = 300, rate: float = 1e-5) -> Array:
    """Adam on that loss, from the sum, its gradient written out for each delta."""

    def merge(x: Matrices) -> Array:
        m = sum(x)
        first, second = np.zeros_like(m), np.zeros_like(m)
        for step in range(1, steps + 1):
            gradient = sum(2 * ((m - d) @ d.T) @ d / (d**2).sum() for d in x if d.any())
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            m = m - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        return m

    return per_matrix(deltas, merge)


def wudi_closed(deltas: Matrices, ridge: float = 0.1) -> Array:
    """The minimum of that loss plus a ridge around the sum, from its normal equations."""

    def merge(x: Matrices) -> Array:
        a = sum(d.T @ d / (d**2).sum() for d in x)
        b = sum(d @ d.T @ d / (d**2).sum() for d in x)
        r = ridge * np.trace(a) / len(a)
        return (b + r * sum(x)) @ np.linalg.inv(a + r * np.eye(len(a)))

    return per_matrix(deltas, merge)


def arcee_importance(base: Array, model: Array) -> Array:
    """|p - q| times the divergence of its row."""
    rows = [x.reshape(-1, x.shape[-1] if x.ndim else 1) for x in (base, model)]
    q, p = (np.exp(r - r.max(axis=1, keepdims=True)) for r in rows)
    q, p = (x / x.sum(axis=1, keepdims=True) + 1e-8 for x in (q, p))
    divergence = (p * np.log(p / q)).sum(axis=1, keepdims=True)
    return (abs(rows[1] - rows[0]) * divergence).reshape(base.shape)


def arcee_threshold(importance: Array) -> float:
    """Median plus one and a half times the distance from the first to the third quartile."""
    ranked = np.sort(importance.reshape(-1))
    q1, q2, q3 = (ranked[int(share * (len(ranked) - 1))] for share in (0.25, 0.5, 0.75))
    return float(q2 + 1.5 * (q3 - q1))
