"""The work of the ``span`` form: the Gram matrix where the method wants it, then one weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mergekit.execute.float_work import MergeWork
from mergekit.execute.statistics import lengths_and_cosines
from mergekit.execute.work import Job, split
from mergekit.methods import Span, get_method
from mergekit.methods.guard import guarded
from mergekit.methods.spec import Vectors
from mergekit.planning.expression import Apply

__all__ = ["SpanWork"]

_CHUNK = 1 << 16
"""Rows or columns whose coefficients are found at once."""


class SpanWork(MergeWork):
    """Coefficients from the Gram matrix (where the method wants one), then one weighted sum.

    Vectors are the whole tensor, its rows, or its columns: element e belongs to vector (e // inner) % vectors.
    """

    def __init__(self, apply: Apply, job: Job) -> None:
        super().__init__(apply, job)
        form = self.method.form
        assert isinstance(form, Span)
        self._origin = self.base if form.space == "deltas" else -1
        self._kind, self._inner, self._vectors = _vectors(apply, job.output.shape)
        n = len(self.readers)
        self.phases = 2 if form.gram else 1
        self._grams: list[np.ndarray | None] = [None] * len(self.ranges)
        self._gram: np.ndarray | None = None
        self._table = np.zeros((n, self._vectors), np.float32)
        self._is_alone = False
        if not form.gram:
            self._solve(None)

    @classmethod
    def held(cls, apply: Apply, shape: tuple[int, ...], threads: int) -> int:
        """Gram matrices and coefficients of rows or columns; those of columns once for each range."""
        kind, _, vectors = _vectors(apply, shape)
        if kind == "tensor":
            return 0
        parts = len(split(math.prod(shape))) if kind == "columns" else 1
        n = len(apply.inputs)
        return vectors * n * ((parts + 1) * 8 * n + 4) + min(vectors, _CHUNK) * 8 * n * (3 * n + 8)

    @classmethod
    def compiled(cls, apply: Apply) -> tuple[str, ...]:
        """The kernels for rows and columns are a family of their own."""
        return ("span",) if _kind(apply) == "tensor" else ("span", "vectors")

    def begin(self, phase: int, index: int) -> Any:
        """The Gram matrices of one range: of the tensor, of the rows that it touches, or of all columns."""
        if phase == self.phases - 1:
            return None
        n = len(self.readers)
        shape: tuple[int, ...] = (n, n)
        if self._kind == "rows":
            first, last = self._rows(index)
            shape = (last - first, n, n)
        elif self._kind == "columns":
            shape = (n, n, self._vectors)
        self._grams[index] = np.zeros(shape)
        return self._grams[index]

    def _rows(self, index: int) -> tuple[int, int]:
        """The rows that a range touches: the first, and one past the last."""
        start, count = self.ranges[index]
        return start // self._inner, -(-(start + count) // self._inner)

    def observe(self, phase: int, index: int, state: Any, rows: np.ndarray, at: int, count: int) -> None:
        if self._kind == "rows":
            first, _ = self._rows(index)
            self.kernels.row_grams(rows, self.codes, self._origin, self._inner, first, at, count, state)
        elif self._kind == "columns":
            self.kernels.column_grams(rows, self.codes, self._origin, self._vectors, at, count, state)
        else:
            self.kernels.gram(rows, self.codes, self._origin, count, state)

    def merge(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray, code: int) -> bool:
        kernels, codes, origin = self.kernels, self.codes, self._origin
        if self._kind != "tensor":
            finite = kernels.weighted_vectors(rows, codes, self._table, origin, self._inner, at, count, out, code)
        elif self._is_alone:
            finite = kernels.weighted_sum(rows[1:], codes[1:], self._table[1:, 0], count, out, code)
        elif origin < 0:
            finite = kernels.weighted_sum(rows, codes, self._table[:, 0], count, out, code)
        else:
            finite = kernels.weighted_delta_sum(rows, codes, self._table[:, 0], origin, count, out, code)
        return bool(finite)

    def exact(self) -> Mapping[str, Any]:
        """Where the Gram matrix of whole tensors was needed, lengths and angles are known from all elements."""
        if self._gram is None:
            return {}
        found = lengths_and_cosines(self._gram, "deltas" if self._origin >= 0 else "norms")
        if self._origin != self.base:  # the angles are those between models, not between their deltas
            del found["cosines"]
        return found

    def reduce(self, phase: int) -> None:
        if phase < self.phases - 1:
            upper = self._added()
            if self._kind == "tensor":
                self._gram = self._symmetric(upper)
                self._solve(self._gram)
            else:
                for first in range(0, self._vectors, _CHUNK):
                    self._solve(self._symmetric(upper[first : first + _CHUNK]), first)
        super().reduce(phase)

    def _added(self) -> np.ndarray:
        """The upper triangles of all ranges together, [n, n] or [vectors, n, n]: in the order of the ranges."""
        n = len(self.readers)
        shapes = {"tensor": (n, n), "rows": (self._vectors, n, n), "columns": (n, n, self._vectors)}
        total = np.zeros(shapes[self._kind])
        for index, part in enumerate(self._grams):
            assert part is not None
            if self._kind == "rows":
                first, last = self._rows(index)
                total[first:last] += part
            else:
                total += part
            self._grams[index] = None
        return np.moveaxis(total, -1, 0) if self._kind == "columns" else total

    def _symmetric(self, upper: np.ndarray) -> np.ndarray:
        """Gram matrices from their upper triangles, of the deltas without the base."""
        upper = upper[..., 1:, 1:] if self._origin >= 0 else upper
        gram: np.ndarray = upper + np.swapaxes(np.triu(upper, 1), -1, -2)
        return gram

    def _solve(self, gram: np.ndarray | None, first: int = 0) -> None:
        """The coefficients of the vectors from ``first`` on."""
        if gram is not None:
            # The sum will show where inputs are not finite; the function shall not fail there.
            finite = np.isfinite(gram).all(axis=(-2, -1), keepdims=True)
            gram = np.where(finite, gram, 0.0)
        result = self.apply.scale * np.asarray(self.method.function(gram, **self.parameters), np.float64)
        # A single model as it is: to take the base away and add it back would round.
        self._is_alone = self._origin >= 0 and result.tolist() == [1.0]
        # Coefficients of deltas are for the models after the base.
        result = np.atleast_2d(result).T
        self._table[len(self._table) - len(result) :, first : first + result.shape[1]] = result


def _vectors(apply: Apply, shape: tuple[int, ...]) -> tuple[Vectors, int, int]:
    """What the vectors of a tensor are, the length of their runs, and their number."""
    kind, size = _kind(apply), math.prod(shape)
    if kind == "tensor" or len(shape) < 2 or size == 0:
        return "tensor", max(size, 1), 1
    return ("rows", shape[-1], size // shape[-1]) if kind == "rows" else ("columns", 1, size // shape[0])


def _kind(apply: Apply) -> Vectors:
    """What the method takes for one vector, in tensors of several axes."""
    form = guarded(get_method(apply.method), "of several axes", len(apply.inputs)).form
    assert isinstance(form, Span)
    return form.vectors(**dict(apply.parameters)) if form.vectors else "tensor"
