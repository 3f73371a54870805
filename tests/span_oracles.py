"""Span methods in plain float64 NumPy, on the vectors themselves: no Gram matrix, no coefficients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def by_vector(function: Callable[..., Array], kind: str, arrays: list[Array]) -> Array:
    """``function`` on whole tensors, on each row (run along the last axis), or on each column (along the first)."""
    shape = arrays[0].shape
    if kind == "tensor" or len(shape) < 2:
        return function([a.reshape(-1) for a in arrays]).reshape(shape)
    if kind == "rows":
        rows = [a.reshape(-1, shape[-1]) for a in arrays]
        return np.stack([function([r[i] for r in rows]) for i in range(len(rows[0]))]).reshape(shape)
    columns = [a.reshape(shape[0], -1) for a in arrays]
    return np.stack([function([c[:, i] for c in columns]) for i in range(columns[0].shape[1])], axis=1).reshape(shape)


def nuslerp(base: Array | None, models: list[Array], weight: list[float], kind: str = "tensor") -> Array:
    """Great-circle interpolation of two vectors, or of their differences from the base."""
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total

    def one(pair: list[Array]) -> Array:
        units = [v / max(np.linalg.norm(v), 1e-7) for v in pair]
        c = float(np.clip(units[0] @ units[1], -1, 1))
        if 1 - c * c <= 1e-16 or c < -1 + 1e-6:
            return (1 - t) * pair[0] + t * pair[1]
        theta = np.arccos(c)
        return (np.sin((1 - t) * theta) * pair[0] + np.sin(t * theta) * pair[1]) / np.sin(theta)

    if base is None:
        return by_vector(one, kind, models)
    return base + by_vector(one, kind, [m - base for m in models])


def multislerp(base: Array | None, models: list[Array], weight: list[float], normalize=True, eps=1e-8) -> Array:
    """The tangent-space form as published, step for step."""
    if len(models) == 1:
        return models[0]
    x = [(m if base is None else m - base).reshape(-1) for m in models]
    w = np.array(weight) / (sum(weight) if normalize else 1)
    n = [np.linalg.norm(v) for v in x]
    u = [v / (length + eps) for v, length in zip(x, n, strict=True)]
    m = sum(a * b for a, b in zip(w, u, strict=True))
    if np.linalg.norm(m) < 1e-6:
        result = sum(a * b for a, b in zip(w, x, strict=True))
    else:
        m = m / np.linalg.norm(m)
        tangent = sum(a * (b - (b @ m) * m) for a, b in zip(w, u, strict=True))
        tau = np.linalg.norm(tangent) + eps
        result = (m * np.cos(tau) + tangent * np.sin(tau) / tau) * sum(w * n)
    result = result.reshape(models[0].shape)
    return result if base is None else base + result


def karcher(models: list[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    """Repeated mean logarithms on the sphere."""
    if len(models) == 1:
        return models[0]
    x = [m.reshape(-1) for m in models]
    n = np.array([np.linalg.norm(v) for v in x])
    u = [v / length for v, length in zip(x, n, strict=True) if length > tol]
    if not u:
        return np.zeros_like(models[0])
    m = sum(u) / len(u)
    m = u[0] if np.linalg.norm(m) < tol else m / np.linalg.norm(m)
    for _ in range(max_iter):
        step = np.zeros_like(m)
        for v in u:
            c = float(np.clip(v @ m, -1, 1))
            theta = np.arccos(c)
            if theta >= tol and c > -1 + 1e-6:
                step += theta / np.sin(theta) * (v - c * m) / len(u)
        length = np.linalg.norm(step)
        if length < tol:
            break
        m = np.cos(length) * m + np.sin(length) * step / length
        m /= np.linalg.norm(m)
    return (m * n.mean()).reshape(models[0].shape)


def model_stock(base: Array, models: list[Array], kind: str = "tensor") -> Array:
    """t between the base and the mean, from the mean cosine of the task vectors."""
    count = len(models)

    def share(deltas: list[Array]) -> Array:
        cosines = []
        for i in range(count):
            for j in range(i + 1, count):
                scale = np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])
                cosines.append(np.clip(deltas[i] @ deltas[j] / scale, -1, 1) if scale > 0 else 0.0)
        c = np.mean(cosines)
        bottom = 1 + (count - 1) * c
        t = count * c / bottom if abs(bottom) >= 1e-6 else 0.0
        return t * sum(deltas) / count

    return base + by_vector(share, kind, [m - base for m in models])
