"""The work of the ``elementwise`` form: selection, sums over the tensor, then the function."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np

from mergekit.execute.float_work import MergeWork, guard
from mergekit.execute.passes import passes
from mergekit.execute.selection import locate
from mergekit.execute.work import Job, split
from mergekit.kernels.elementwise import ALL, CHUNK, TABLES
from mergekit.methods import Elementwise, get_method
from mergekit.methods.guard import is_built_in
from mergekit.planning.expression import Apply

__all__ = ["ElementwiseWork"]

_COARSE_BINS, _FINE_BINS = 1 << 15, 1 << 16
_MAGNITUDE = 0x7FFFFFFF
_TEMPORARIES = 12
"""Arrays of a chunk that a method's function is taken to hold, beyond the inputs."""


@dataclass(slots=True, eq=False)
class _Range:
    """What one range keeps from block to block: ties still to be selected, counts and sums."""

    ties: int
    coarse: np.ndarray | None = None
    sums: np.ndarray | None = None


class ElementwiseWork(MergeWork):
    """A function of elements. Phases: two histograms (the exact k-th key), sums, the merge itself."""

    @classmethod
    def held(cls, apply: Apply, shape: tuple[int, ...], threads: int) -> int:
        """The chunks of each thread, and the histograms of exact selection."""
        method = get_method(apply.method)
        form = method.form
        assert isinstance(form, Elementwise)
        # Functions of ours are compiled, and need no arrays.
        chunks = 0 if is_built_in(method) else threads * (len(apply.inputs) + _TEMPORARIES) * CHUNK * 4
        if form.key is None:
            return chunks
        return chunks + (threads * TABLES + 1) * _COARSE_BINS * 8 + len(split(math.prod(shape), CHUNK)) * _FINE_BINS * 4

    @classmethod
    def compiled(cls, apply: Apply) -> tuple[str, ...]:
        """Its own kernels."""
        return ("elementwise",)

    def __init__(self, apply: Apply, job: Job) -> None:
        # Where blocks may start is for the passes to say, and is needed first.
        codes = np.array([job.kernels.CODES[reader.dtype] for reader in job.readers], np.int64)
        self._passes = passes(apply, guard(apply, job), job.output.name, job.kernels, codes)
        super().__init__(apply, job, self._passes.align)
        form = self.method.form
        assert isinstance(form, Elementwise)
        self._form = form
        selects = form.key is not None and self._keep(self.size) is not None
        self._steps = [*(["coarse", "fine"] if selects else []), *(["measure"] if form.measure else []), "merge"]
        self.phases = len(self._steps)
        ranges = len(self.ranges)
        self._lock = threading.Lock()
        self._coarse = np.zeros(_COARSE_BINS if selects else 0, np.int64)
        self._fine: list[np.ndarray] = []
        self._nonzero = 0
        self._bin, self._rank = 0, 0
        self._threshold = ALL
        self._quota = [0] * ranges
        self._parts: list[np.ndarray | None] = [None] * ranges

    def _keep(self, nonzero: int) -> int | None:
        """How many elements are selected if ``nonzero`` of the keys are not zero; None if all are."""
        assert self._form.keep is not None, "a method with 'key' has 'keep'"
        count = self._form.keep(nonzero, self.size, **self.parameters)
        return None if count is None else max(0, int(count))

    def begin(self, phase: int, index: int) -> _Range:
        """Private counts and quotas."""
        state = _Range(self._quota[index])
        if self._steps[phase] == "coarse":
            state.coarse = np.zeros((TABLES, _COARSE_BINS), np.int64)
        return state

    def observe(self, phase: int, index: int, state: _Range, rows: np.ndarray, at: int, count: int) -> None:
        step = self._steps[phase]
        if step == "coarse":
            assert state.coarse is not None
            nonzero = self._passes.count_upper(rows, count, state.coarse)
            with self._lock:
                self._nonzero += nonzero
        elif step == "fine":
            if self._fine:
                self._passes.count_lower(rows, count, self._bin, self._fine[index])
        else:
            state.ties, state.sums = self._passes.measure(rows, count, self._threshold, state.ties, state.sums)

    def merge(self, state: _Range, rows: np.ndarray, at: int, count: int, out: np.ndarray, code: int) -> bool:
        state.ties, finite = self._passes.merge(rows, count, self._threshold, state.ties, out, code)
        return finite

    def end(self, phase: int, index: int, state: _Range) -> None:
        """Keep a range's sums; add its histogram to the tensor's (whole numbers, so the order does not matter)."""
        if state.sums is not None:
            self._parts[index] = state.sums
        if state.coarse is not None:
            with self._lock:
                self._coarse += state.coarse.sum(axis=0)

    def reduce(self, phase: int) -> None:
        step = self._steps[phase]
        if step == "coarse":
            self._find_bin()
        elif step == "fine":
            self._set_threshold()
        elif step == "measure":
            parts = [part for part in self._parts if part is not None]
            if parts:
                self._passes = self._passes.measured(sum(parts[1:], parts[0]))
        super().reduce(phase)

    def _find_bin(self) -> None:
        """Where the k-th key falls; if all elements are selected, or none, nothing more is to be counted."""
        count = self._keep(self._nonzero)
        if count is not None and 0 < count < self.size:
            self._bin, self._rank = locate(self._coarse, count)
            self._fine = [np.zeros(_FINE_BINS, np.uint32) for _ in self.ranges]
            return
        self._threshold = ALL if count is None or count >= self.size else _MAGNITUDE

    def _set_threshold(self) -> None:
        """The k-th key, and how many elements whose key equals it each range keeps (lower index first)."""
        if not self._fine:
            return
        total = np.zeros(_FINE_BINS, np.int64)
        for counts in self._fine:
            total += counts
        low, left = locate(total, self._rank)
        self._threshold = self._bin << 16 | low
        for index, counts in enumerate(self._fine):
            self._quota[index] = min(left, int(counts[low]))
            left -= self._quota[index]
        self._fine = []
