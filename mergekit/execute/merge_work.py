"""The work of merge methods: the ``span`` form (Gram matrix, then a weighted sum) and the ``sparse`` form."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from mergekit.execute.inputs import Inputs
from mergekit.execute.work import FloatWork, Sink, Work, copy_or_cast
from mergekit.methods import get_method
from mergekit.methods.rules import KeepAll, RandomKeep, SparseMerge, TopMagnitude
from mergekit.methods.spec import Span
from mergekit.planning.plan import Apply, OutputTensor, Plan
from mergekit.seeds import stream_key

__all__ = ["make_work"]


def make_work(
    output: OutputTensor, plan: Plan, inputs: Inputs, kernels: Any, sink: Sink, block: int | None = None
) -> Work:
    """The work that computes ``output``. ``block`` overrides the number of elements handled at once."""
    names = [source.short for source in plan.sources]
    work = copy_or_cast(output, inputs, kernels, sink, plan.allow_nonfinite, block, names)
    if work is not None:
        return work
    expression = output.expression
    assert isinstance(expression, Apply)
    readers = [inputs.reader(leaf) for leaf in expression.inputs]
    common = (plan.allow_nonfinite, output, readers, kernels, sink, block)
    if isinstance(get_method(expression.method).form, Span):
        return SpanWork(expression, *common)
    return SparseWork(expression, plan.seed, *common)


class SpanWork(FloatWork):
    """Coefficients from the Gram matrix (where the method wants one), then one weighted sum."""

    def __init__(self, apply: Apply, *args: Any) -> None:
        super().__init__(*args)
        method = get_method(apply.method)
        assert isinstance(method.form, Span)
        self._function, self._parameters = method.function, dict(apply.parameters)
        self._base = 0 if method.form.space == "deltas" else -1
        n = len(self.readers)
        self.phases = 2 if method.form.gram else 1
        self._grams = np.zeros((len(self.ranges), n, n))
        self._coefficients = np.zeros(n, np.float32)
        if not method.form.gram:
            self._solve(None)

    def _solve(self, gram: np.ndarray | None) -> None:
        if gram is not None and not np.isfinite(gram).all():
            self.check(False)
            gram = np.zeros_like(gram)  # the sum will show what the inputs hold
        result = np.asarray(self._function(gram, **self._parameters), np.float64)
        # Coefficients of deltas are for the models after the base.
        self._coefficients[len(self._coefficients) - len(result) :] = result

    def observe(self, phase: int, index: int, state: Any, rows: np.ndarray, at: int, count: int) -> None:
        self.kernels.gram(rows, self.codes, self._base, count, self._grams[index])

    def compute(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray) -> None:
        if self._base < 0:
            finite = self.kernels.weighted_sum(rows, self.codes, self._coefficients, count, out, self.out_code)
        else:
            finite = self.kernels.weighted_delta_sum(
                rows, self.codes, self._coefficients, self._base, count, out, self.out_code
            )
        self.check(finite)

    def reduce(self, phase: int) -> None:
        if phase < self.phases - 1:
            upper = np.zeros(self._grams.shape[1:])
            for partial in self._grams:
                upper += partial
            gram = np.triu(upper) + np.triu(upper, 1).T
            self._solve(gram[1:, 1:] if self._base == 0 else gram)
        super().reduce(phase)


class SparseWork(FloatWork):
    """Keep rules, rescaling, consensus. Phases: two histograms (exact k-th magnitudes), norms, the merge itself."""

    def __init__(self, apply: Apply, seed: int, *args: Any) -> None:
        super().__init__(*args)
        merge: SparseMerge = get_method(apply.method).function(**dict(apply.parameters))
        self._merge = merge
        n, ranges = len(self.readers), len(self.ranges)
        self._rules = np.full(n, self.kernels.KEEP_ALL, np.int64)
        self._thresholds = np.zeros(n, np.uint32)
        self._quota = np.zeros((ranges, n), np.int64)
        self._chances = np.zeros(n, np.uint32)
        self._keys = np.zeros((n, 2), np.uint32)
        self._counts = np.zeros(n, np.int64)
        for m, keep in enumerate(merge.keep, start=1):
            self._set_rule(m, keep)
            self._keys[m] = stream_key(seed, self.output.name, apply.models[m])
        self._weights = np.array([0, *merge.weight], np.float32)
        self._scales = np.ones(n, np.float32)
        self._is_top = self._rules == self.kernels.KEEP_TOP
        drops = self._is_top | (self._rules == self.kernels.KEEP_RANDOM)
        self._rescaled = drops if merge.rescale else np.zeros(n, np.bool_)
        self._steps = [
            *(["coarse", "fine"] if self._is_top.any() else []),
            *(["norms"] if self._rescaled.any() else []),
            "merge",
        ]
        self.phases = len(self._steps)
        self._lock = threading.Lock()
        self._coarse = np.zeros((n, self.kernels.COARSE_BINS), np.int64) if self._is_top.any() else None
        self._fine: list[np.ndarray | None] = [None] * ranges
        self._bins = np.zeros(n, np.int64)
        self._norms = np.zeros((ranges, n, 2))
        self._factor = np.float32(merge.factor)
        if merge.normalize and not merge.consensus:
            total = float(np.sum(np.array(merge.weight, np.float64)))
            self._factor = np.float32(merge.factor / total) if abs(total) >= 1e-8 else self._factor

    def _set_rule(self, m: int, keep: KeepAll | TopMagnitude | RandomKeep) -> None:
        if isinstance(keep, KeepAll) or keep.density >= 1:
            return
        if keep.density <= 0:
            self._rules[m] = self.kernels.KEEP_NONE
        elif isinstance(keep, TopMagnitude):
            self._rules[m] = self.kernels.KEEP_TOP
            self._counts[m] = min(max(1, int(np.floor(keep.density * self.size))), self.size)
        else:
            self._rules[m] = self.kernels.KEEP_RANDOM
            self._chances[m] = min(round(keep.density * 2**32), 2**32 - 1)

    def begin(self, phase: int, index: int) -> Any:
        """Private histograms or tie quotas of one range."""
        step = self._steps[phase]
        if step == "coarse":
            assert self._coarse is not None
            return np.zeros_like(self._coarse)
        if step == "fine":
            self._fine[index] = np.zeros((len(self.readers), self.kernels.FINE_BINS), np.uint32)
            return self._fine[index]
        return self._quota[index].copy()

    def observe(self, phase: int, index: int, state: Any, rows: np.ndarray, at: int, count: int) -> None:
        step = self._steps[phase]
        if step == "coarse":
            self.kernels.coarse_histogram(rows, self.codes, 0, self._is_top, count, state)
        elif step == "fine":
            self.kernels.fine_histogram(rows, self.codes, 0, self._is_top, self._bins, count, state)
        else:
            self.kernels.kept_norms(
                rows, self.codes, 0, self._rescaled, self._rules, self._thresholds, state, self._chances, self._keys,
                at, count, self._norms[index],
            )  # fmt: skip

    def compute(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray) -> None:
        finite = self.kernels.sparse_sum(
            rows, self.codes, 0, self._rules, self._thresholds, state, self._chances, self._keys, self._weights,
            self._scales, self._merge.consensus, self._merge.normalize, self._factor, at, count, out, self.out_code,
        )  # fmt: skip
        self.check(finite)

    def end(self, phase: int, index: int, state: Any) -> None:
        """Add a range's coarse histogram to the tensor's; whole numbers, so the order does not matter."""
        if self._steps[phase] == "coarse":
            with self._lock:
                self._coarse += state

    def reduce(self, phase: int) -> None:
        step = self._steps[phase]
        if step == "coarse":
            assert self._coarse is not None
            for m in np.flatnonzero(self._is_top):
                self._bins[m], self._counts[m] = _locate(self._coarse[m], int(self._counts[m]))
            self._coarse = None
        elif step == "fine":
            self._set_thresholds()
        elif step == "norms":
            before, after = self._norms.sum(axis=0).T
            for m in np.flatnonzero(self._rescaled):
                if before[m] > 0 and 0 < after[m] < np.inf:
                    self._scales[m] = before[m] / after[m]
        super().reduce(phase)

    def _set_thresholds(self) -> None:
        """The k-th magnitude of each model, and how many entries equal to it each range keeps (lower index first)."""
        fine = [f for f in self._fine if f is not None]
        for m in np.flatnonzero(self._is_top):
            total = np.zeros(self.kernels.FINE_BINS, np.int64)
            for histogram in fine:
                total += histogram[m]
            low, left = _locate(total, int(self._counts[m]))
            self._thresholds[m] = (int(self._bins[m]) << 16) | low
            for index, histogram in enumerate(fine):
                share = min(left, int(histogram[m, low]))
                self._quota[index, m] = share
                left -= share
        self._fine = [None] * len(self.ranges)


def _locate(histogram: np.ndarray, count: int) -> tuple[int, int]:
    """The bin in which the ``count``-th largest entry falls, and its rank inside that bin."""
    above = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(above, count))
    return len(histogram) - 1 - place, count - int(above[place] - histogram[::-1][place])
