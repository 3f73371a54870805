"""Figures about a merged tensor, gathered while it is computed: lengths, angles, conflicts, what rounding left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Tally", "lengths_and_cosines"]


class Tally:
    """Sums over the blocks of one tensor that are looked at. Each range has its own, so that order is no matter."""

    def __init__(self, models: int, ranges: int) -> None:
        self._products = np.zeros((ranges, models + 2, models + 2))
        self._counts = np.zeros((ranges, 2), np.int64)
        self._seen = np.zeros(ranges, np.int64)

    def add(
        self,
        kernels: Any,
        rows: np.ndarray,
        codes: np.ndarray,
        base: int,
        values: np.ndarray,
        out: np.ndarray,
        out_code: int,
        count: int,
        index: int,
    ) -> None:
        """Look at a block of range ``index``: inputs ``rows``, the result as computed and as stored."""
        kernels.statistics(rows, codes, base, values, out, out_code, count, self._products[index], self._counts[index])
        self._seen[index] += count

    @np.errstate(invalid="ignore", over="ignore")  # a tensor that is not finite has figures that aren't
    def record(self, size: int, base: int, exact: Mapping[str, Any], nonfinite: int) -> dict[str, Any]:
        """The figures of a tensor of ``size`` elements as plain data. Lengths are scaled up from the sample.

        ``share``: the part of the elements looked at. ``norms`` and ``result``: lengths of the inputs and the result;
        ``norm_ratio``: the result's over the mean of the inputs'. With a base also: ``deltas``, the lengths of the
        models' differences from it; ``cosines`` between them, for the pairs (0, 1), (0, 2), ... (1, 2) ...;
        ``shared``: the share of the entries that two models or more change; ``sign_conflict``: of those, the share
        where they disagree; ``change``, the length of the result's difference from the base, and ``survival``, the
        share of it left after rounding.
        Without a base ``cosines`` are those of the models. ``exact`` replaces figures by those of the whole tensor.
        """
        products, seen = self._products.sum(axis=0), int(self._seen.sum())
        products = np.triu(products) + np.triu(products, 1).T
        n = len(products) - 2
        scale = size / seen if seen else 0.0
        lengths = np.sqrt(np.maximum(np.diag(products), 0) * scale)
        figures: dict[str, Any] = {"elements": size, "share": _short(1 / scale if scale else 0.0)}
        if base < 0:
            norms, result = lengths[:n], float(lengths[n])
            figures["cosines"] = _cosines(products[:n, :n])
        else:
            origin = products[base, base]
            squares = origin + 2 * products[base] + np.diag(products)
            squares[base] = origin
            norms, result = np.sqrt(np.maximum(squares[:n], 0) * scale), math.sqrt(max(squares[n], 0) * scale)
            others = [m for m in range(n) if m != base]
            figures["deltas"] = [_short(lengths[m]) for m in others]
            figures["cosines"] = _cosines(products[np.ix_(others, others)])
            shared, torn = (int(c) for c in self._counts.sum(axis=0))
            figures["shared"] = _short(shared / seen) if seen else 0.0
            figures["sign_conflict"] = _short(torn / shared) if shared else 0.0
            figures["change"] = _short(lengths[n])
            figures["survival"] = _short(products[n, n + 1] / products[n, n]) if products[n, n] != 0 else 1.0
        mean = float(np.mean(norms)) if n else 0.0
        figures["norms"] = [_short(x) for x in norms]
        figures["result"] = _short(result)
        figures["norm_ratio"] = _short(result / mean) if mean != 0 else 1.0
        figures["nonfinite"] = nonfinite
        figures.update(exact)
        figures["exact"] = sorted(exact) if scale > 1 else "all"
        return figures


def lengths_and_cosines(gram: np.ndarray, name: str) -> dict[str, Any]:
    """The figures that a Gram matrix of whole tensors tells: their lengths, under ``name``, and ``cosines``."""
    return {name: [_short(x) for x in np.sqrt(np.maximum(np.diag(gram), 0))], "cosines": _cosines(gram)}


@np.errstate(invalid="ignore", over="ignore")
def _cosines(products: np.ndarray) -> list[float | None]:
    """The cosines of each pair, from the inner products; 0 where one of the two is zero."""
    lengths = np.sqrt(np.maximum(np.diag(products), 0))
    pairs = [(a, b) for a in range(len(products)) for b in range(a + 1, len(products))]
    scales = [lengths[a] * lengths[b] for a, b in pairs]
    return [_short(products[p] / s) if s != 0 else 0.0 for p, s in zip(pairs, scales, strict=True)]


def _short(value: float) -> float | None:
    """Six digits are enough for people, and keep the file small; None for what is not finite, which is no JSON."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
