"""The work of the ``elementwise`` form: selection, sums over the tensor, then the function, chunk by chunk."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit.errors import UsageError
from mergekit.execute.float_work import MergeWork
from mergekit.execute.selection import locate
from mergekit.execute.work import Job, split
from mergekit.kernels.elementwise import CHUNK, TABLES
from mergekit.methods import Elementwise, get_method
from mergekit.planning.plan import Apply

__all__ = ["ElementwiseWork"]

_COARSE_BINS, _FINE_BINS = 1 << 15, 1 << 16
_MAGNITUDE = 0x7FFFFFFF
_TEMPORARIES = 12
"""Arrays of a chunk that a method's function is taken to hold, beyond the inputs."""


@dataclass(slots=True, eq=False)
class _Range:
    """What one range keeps from block to block: memory for chunks, ties still to be selected, counts and sums."""

    scratch: np.ndarray
    ties: int
    coarse: np.ndarray | None = None
    sums: np.ndarray | None = None


class ElementwiseWork(MergeWork):
    """A function of chunks. Phases: two histograms (the exact k-th key), sums, the merge itself.

    Chunks start at multiples of their size from the start of a range, whatever the blocks, so sums are the same too.
    """

    @classmethod
    def held(cls, apply: Apply, shape: tuple[int, ...], threads: int) -> int:
        """The chunks of each thread, and the histograms of exact selection."""
        form = get_method(apply.method).form
        assert isinstance(form, Elementwise)
        chunks = threads * (len(apply.inputs) + _TEMPORARIES) * CHUNK * 4
        if form.key is None:
            return chunks
        return chunks + (threads * TABLES + 1) * _COARSE_BINS * 8 + len(split(math.prod(shape), CHUNK)) * _FINE_BINS * 4

    @classmethod
    def compiled(cls, apply: Apply) -> tuple[str, ...]:
        """Its own kernels."""
        return ("elementwise",)

    def __init__(self, apply: Apply, job: Job) -> None:
        super().__init__(apply, job, CHUNK)
        form = self.method.form
        assert isinstance(form, Elementwise)
        self._form, self._xp = form, self.kernels.arrays()
        self._origin = self.base if form.space == "deltas" else -1
        selects = form.key is not None and self._keep(self.size) is not None
        self._steps = [*(["coarse", "fine"] if selects else []), *(["measure"] if form.measure else []), "merge"]
        self.phases = len(self._steps)
        ranges = len(self.ranges)
        self._lock = threading.Lock()
        self._coarse = np.zeros(_COARSE_BINS if selects else 0, np.int64)
        self._fine: list[np.ndarray] = []
        self._nonzero = 0
        self._bin, self._rank = 0, 0
        self._threshold: int | None = None
        self._quota = [0] * ranges
        self._parts: list[np.ndarray | None] = [None] * ranges
        self._measured: np.ndarray | None = None
        self._count: int | None = None

    def _keep(self, nonzero: int) -> int | None:
        """How many elements are selected if ``nonzero`` of the keys are not zero; None if all are."""
        assert self._form.keep is not None, "a method with 'key' has 'keep'"
        count = self._form.keep(nonzero, self.size, **self.parameters)
        return None if count is None else max(0, int(count))

    def begin(self, phase: int, index: int) -> _Range:
        """Memory for chunks, and private counts and quotas."""
        step = self._steps[phase]
        state = _Range(np.empty((len(self.readers), self.kernels.CHUNK), np.float32), self._quota[index])
        if step == "coarse":
            state.coarse = np.zeros((TABLES, _COARSE_BINS), np.int64)
        return state

    def observe(self, phase: int, index: int, state: _Range, rows: np.ndarray, at: int, count: int) -> None:
        step = self._steps[phase]
        if step == "fine" and not self._fine:
            return
        with np.errstate(all="ignore"):
            for _, _, x in self._chunks(state, rows, count):
                if step == "coarse":
                    self._count_coarse(state, self._keys(x))
                elif step == "fine":
                    self.kernels.count_lower(self._keys(x), self._bin, self._fine[index])
                else:
                    self._measure(state, self._selected(state, x))

    def merge(self, state: _Range, rows: np.ndarray, at: int, count: int, out: np.ndarray, code: int) -> bool:
        finite, width = True, out.nbytes // count
        extra = () if self._form.measure is None else (self._measured,)
        with np.errstate(all="ignore"):
            for start, origin, x in self._chunks(state, rows, count):
                result = self.method.function(self._xp, self._selected(state, x), *extra, **self.parameters)
                if self.apply.scale != 1:
                    result = result * self.apply.scale
                if origin is not None:
                    result = result + origin
                values = np.ascontiguousarray(self.kernels.on_host(result), np.float32)
                finite &= bool(self.kernels.store(values, len(values), out[start * width :], code))
        return finite

    def _chunks(self, state: _Range, rows: np.ndarray, count: int) -> Iterator[tuple[int, Any, tuple[Any, ...]]]:
        """The chunks of a block: start in the block, the base (None if it is not to be added), the arrays."""
        for start in range(0, count, self.kernels.CHUNK):
            length = min(self.kernels.CHUNK, count - start)
            x = self.kernels.load_chunk(rows, self.codes, self._origin, start, length, state.scratch)
            yield (start, None, x) if self._origin < 0 else (start, x[0], x[1:])

    def _keys(self, x: tuple[Any, ...]) -> Any:
        assert self._form.key is not None
        return self._xp.asarray(self._form.key(self._xp, x, **self.parameters), dtype=self._xp.float32)

    def _count_coarse(self, state: _Range, key: Any) -> None:
        nonzero = self.kernels.count_upper(key, state.coarse)
        with self._lock:
            self._nonzero += nonzero

    def _selected(self, state: _Range, x: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arrays with zeros where the key is not among the largest; of ties, the first are."""
        if self._threshold is None:
            return x
        x, state.ties = self.kernels.keep_largest(x, self._keys(x), self._threshold, state.ties)
        return x

    def _measure(self, state: _Range, x: tuple[Any, ...]) -> None:
        assert self._form.measure is not None
        sums = np.asarray(self.kernels.on_host(self._form.measure(self._xp, x, **self.parameters)), np.float64)
        with self._lock:
            self._count = len(sums) if self._count is None else self._count
        if len(sums) != self._count:
            raise UsageError(
                f"method '{self.method.name}' on tensor {self.output.name}: its 'measure' returns {self._count} sums "
                f"for one chunk and {len(sums)} for another; their number must not depend on the data"
            )
        state.sums = sums if state.sums is None else state.sums + sums

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
            for part in self._parts:
                assert part is not None
                self._measured = part if self._measured is None else self._measured + part
        super().reduce(phase)

    def _find_bin(self) -> None:
        """Where the k-th key falls; if all elements are selected, or none, nothing more is to be counted."""
        count = self._keep(self._nonzero)
        if count is not None and 0 < count < self.size:
            self._bin, self._rank = locate(self._coarse, count)
            self._fine = [np.zeros(_FINE_BINS, np.uint32) for _ in self.ranges]
            return
        self._threshold = None if count is None or count >= self.size else _MAGNITUDE

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
