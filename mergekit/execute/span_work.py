"""The work of the ``span`` form: the Gram matrix where the method wants it, then one weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mergekit.execute.float_work import MergeWork
from mergekit.execute.statistics import lengths_and_cosines
from mergekit.execute.work import Job
from mergekit.methods import Span
from mergekit.planning.plan import Apply

__all__ = ["SpanWork"]


class SpanWork(MergeWork):
    """Coefficients from the Gram matrix (where the method wants one), then one weighted sum."""

    def __init__(self, apply: Apply, job: Job) -> None:
        super().__init__(apply, job)
        form = self.method.form
        assert isinstance(form, Span)
        self._origin = self.base if form.space == "deltas" else -1
        n = len(self.readers)
        self.phases = 2 if form.gram else 1
        self._grams = np.zeros((len(self.ranges), n, n))
        self._gram: np.ndarray | None = None
        self._coefficients = np.zeros(n, np.float32)
        if not form.gram:
            self._solve(None)

    def _solve(self, gram: np.ndarray | None) -> None:
        if gram is not None and not np.isfinite(gram).all():
            gram = np.zeros_like(gram)  # the sum will show what the inputs hold
        result = self.apply.scale * np.asarray(self.method.function(gram, **self.parameters), np.float64)
        # Coefficients of deltas are for the models after the base.
        self._coefficients[len(self._coefficients) - len(result) :] = result

    def observe(self, phase: int, index: int, state: Any, rows: np.ndarray, at: int, count: int) -> None:
        self.kernels.gram(rows, self.codes, self._origin, count, self._grams[index])

    def merge(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray, code: int) -> bool:
        if self._origin < 0:
            return bool(self.kernels.weighted_sum(rows, self.codes, self._coefficients, count, out, code))
        return bool(
            self.kernels.weighted_delta_sum(rows, self.codes, self._coefficients, self._origin, count, out, code)
        )

    def exact(self) -> Mapping[str, Any]:
        """Where the Gram matrix was needed, lengths and angles are known from all elements."""
        if self._gram is None or self._origin != self.base:
            return {}
        return lengths_and_cosines(self._gram, "deltas" if self._origin >= 0 else "norms")

    def reduce(self, phase: int) -> None:
        if phase < self.phases - 1:
            upper = np.zeros(self._grams.shape[1:])
            for partial in self._grams:
                upper += partial
            gram = np.triu(upper) + np.triu(upper, 1).T
            self._gram = gram[1:, 1:] if self._origin == 0 else gram
            self._solve(self._gram)
        super().reduce(phase)
