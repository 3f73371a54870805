"""The work of the ``sparse`` form: exact k-th magnitudes, norms for rescaling, then the fused merge."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from mergekit.execute.float_work import MergeWork
from mergekit.execute.work import Job, split
from mergekit.methods import KeepAll, RandomKeep, SparseMerge, TopMagnitude, get_method
from mergekit.planning.plan import Apply
from mergekit.seeds import stream_key

__all__ = ["SparseWork"]

_FINE_BYTES = 4 << 16
_COARSE_BYTES = 8 << 15


class SparseWork(MergeWork):
    """Keep rules, rescaling, consensus. Phases: two histograms (exact k-th magnitudes), norms, the merge itself."""

    @classmethod
    def held(cls, apply: Apply, shape: tuple[int, ...], threads: int) -> int:
        """The histograms of exact selection."""
        merge = get_method(apply.method).function(**dict(apply.parameters))
        if not any(isinstance(keep, TopMagnitude) and 0 < keep.density < 1 for keep in merge.keep):
            return 0
        ranges = len(split(math.prod(shape)))
        return len(apply.inputs) * (ranges * _FINE_BYTES + (threads + 1) * _COARSE_BYTES)

    @classmethod
    def compiled(cls, apply: Apply) -> tuple[str, ...]:
        """Its own kernels besides those that all work calls."""
        return ("span", "sparse")

    def __init__(self, apply: Apply, job: Job) -> None:
        super().__init__(apply, job)
        merge: SparseMerge = self.method.function(**self.parameters)
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
            self._keys[m] = stream_key(job.seed, self.output.name, apply.models[m])
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
        self._factor = np.float32(merge.factor * apply.scale)
        if merge.normalize and not merge.consensus:
            total = float(np.sum(np.array(merge.weight, np.float64)))
            self._factor = np.float32(self._factor / total) if abs(total) >= 1e-8 else self._factor

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

    def merge(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray, code: int) -> bool:
        finite = self.kernels.sparse_sum(
            rows, self.codes, 0, self._rules, self._thresholds, state, self._chances, self._keys, self._weights,
            self._scales, self._merge.consensus, self._merge.normalize, self._factor, at, count, out, code,
        )  # fmt: skip
        return bool(finite)

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
