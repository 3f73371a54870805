"""The work of the ``sparse`` form: exact k-th magnitudes, norms for rescaling, then the fused merge."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mergekit.dtypes import F32
from mergekit.execute import work
from mergekit.execute.float_work import MergeWork
from mergekit.execute.selection import locate
from mergekit.execute.work import BLOCK_BYTES, Job, split
from mergekit.methods import (
    GroupTop,
    KeepAll,
    KeepRule,
    MagnitudeBand,
    RandomKeep,
    RankKeep,
    SparseMerge,
    TopMagnitude,
    get_method,
)
from mergekit.planning.expression import Apply, stored
from mergekit.seeds import stream_key

__all__ = ["SparseWork"]

_FINE_BYTES = 4 << 16
_COARSE_BYTES = 8 << 15
_MASK_BYTES = 128 << 20
"""Masks that are costly to make are kept for the second phase that needs them, up to so many bytes a tensor."""
_LOW, _HIGH = 0, 1


class _Choice(NamedTuple):
    """What a range needs to choose entries: its tie quotas, and room for gains and ranks."""

    quota: np.ndarray
    gains: np.ndarray
    work: np.ndarray


class SparseWork(MergeWork):
    """Keep rules, rescaling, consensus. Phases: two histograms (exact k-th magnitudes), norms, the merge itself."""

    @classmethod
    def held(cls, apply: Apply, shape: tuple[int, ...], threads: int) -> int:
        """The histograms of exact selection; where whole rows or groups are seen at once, the blocks that hold them."""
        merge = get_method(apply.method).function(**dict(apply.parameters))
        size, run = math.prod(shape), _run(merge, shape)
        held = 0
        if any(_selects(keep) for keep in merge.keep):
            tables = 2 if any(isinstance(keep, MagnitudeBand) for keep in merge.keep) else 1
            ranges = len(split(size))
            held += len(apply.inputs) * (ranges * tables * _FINE_BYTES + (threads + 1) * _COARSE_BYTES)
        if run:
            align = _alignment(run, size)
            element = sum((stored(leaf) or F32).size for leaf in apply.inputs) + 2 * F32.size
            block = min(max(align, BLOCK_BYTES // element), size)
            busy = min(threads, len(split(size, align)))
            held += busy * (block * (element + len(apply.inputs) * F32.size) + 48 * run)
            held += _mask_bytes(merge, size)
        return held

    @classmethod
    def compiled(cls, apply: Apply) -> tuple[str, ...]:
        """Its own kernels besides those that all work calls."""
        return ("span", "sparse")

    def __init__(self, apply: Apply, job: Job) -> None:
        merge: SparseMerge = get_method(apply.method).function(**dict(apply.parameters))
        shape = job.output.shape
        self._run = _run(merge, shape)
        super().__init__(apply, job, _alignment(self._run, math.prod(shape)) if self._run else None)
        self._merge = merge
        n, ranges = len(self.readers), len(self.ranges)
        self._set_rules(apply, job)
        drops = (self._rules != self.kernels.KEEP_ALL) & (self._rules != self.kernels.KEEP_NONE)
        self._rescaled = drops if merge.rescale == "l1" else np.zeros(n, np.bool_)
        self._steps = [
            *(["coarse", "fine"] if self._is_top.any() else []),
            *(["norms"] if self._rescaled.any() else []),
            "merge",
        ]
        self.phases = len(self._steps)
        self._lock = threading.Lock()
        self._coarse = np.zeros((n, self.kernels.COARSE_BINS), np.int64) if self._is_top.any() else None
        self._fine: list[np.ndarray | None] = [None] * ranges
        self._bins = np.zeros((2, n), np.int64)
        self._norms = np.zeros((ranges, n, 3))
        self._seen = np.zeros(ranges, np.int64)
        is_kept = "norms" in self._steps and _mask_bytes(merge, self.size) > 0
        self._masks = np.empty((n, -(-self.size // 8)), np.uint8) if self._run and is_kept else None
        self._factor = np.float32(merge.factor * apply.scale)
        if merge.normalize and not merge.consensus:
            total = float(np.sum(np.array(merge.weight, np.float64)))
            self._factor = np.float32(self._factor / total) if abs(total) >= 1e-8 else self._factor
        weighted = self.kernels.ELECT_WEIGHTED if merge.elect == "weighted" else self.kernels.ELECT_UNWEIGHTED
        self._elect = weighted if merge.consensus else self.kernels.ELECT_NONE

    def _set_rules(self, apply: Apply, job: Job) -> None:
        """What the kernels have to know of each model's rule, in arrays."""
        n, merge = len(self.readers), self._merge
        self._rules = np.full(n, self.kernels.KEEP_ALL, np.int64)
        self._thresholds = np.zeros((2, n), np.uint32)
        self._quota = np.zeros((len(self.ranges), 2, n), np.int64)
        self._counts = np.zeros((2, n), np.int64)
        self._chances = np.zeros(n, np.uint32)
        self._keys = np.zeros((n, 2), np.uint32)
        self._lows, self._spans, self._picks = (np.zeros(n, np.int64) for _ in range(3))
        self._weights = np.array([0, *merge.weight], np.float32)
        self._scales = np.ones(n, np.float32)
        self._known = np.full(n, -1, np.int64)
        for m, keep in enumerate(merge.keep, start=1):
            self._keys[m] = stream_key(job.seed, self.output.name, apply.models[m])
            self._set_rule(m, keep)
        self._is_band = self._rules == self.kernels.KEEP_BAND
        self._is_top = self._is_band | (self._rules == self.kernels.KEEP_TOP)
        is_given = self._rules == self.kernels.KEEP_GIVEN
        is_grouped = np.array([False, *(isinstance(keep, GroupTop) for keep in merge.keep)], np.bool_)
        self._is_grouped = is_given & is_grouped
        self._is_ranked = is_given & ~is_grouped
        self._known[self._is_grouped] = self._group_counts()
        if merge.rescale == "density":
            for m, keep in enumerate(merge.keep, start=1):
                self._rescale_by_density(m, keep)

    def _set_rule(self, m: int, keep: KeepRule) -> None:
        kernels, size = self.kernels, self.size
        if isinstance(keep, KeepAll) or (not isinstance(keep, GroupTop) and keep.density >= 1):
            self._known[m] = size
        elif (keep.n if isinstance(keep, GroupTop) else keep.density) <= 0:
            self._rules[m], self._known[m] = kernels.KEEP_NONE, 0
        elif isinstance(keep, TopMagnitude | MagnitudeBand):
            skipped, kept = 0, min(max(1, math.floor(keep.density * size)), size)
            if isinstance(keep, MagnitudeBand):
                skipped, kept = keep.places(size)
            self._counts[:, m] = skipped + kept, skipped
            self._known[m] = kept
            self._rules[m] = kernels.KEEP_BAND if skipped else kernels.KEEP_TOP
            if not kept:
                self._rules[m] = kernels.KEEP_NONE
        elif isinstance(keep, GroupTop):
            self._rules[m], self._picks[m] = kernels.KEEP_GIVEN, keep.n
        else:
            spread = keep.epsilon if isinstance(keep, RankKeep) else 0.0
            self._chances[m] = min(round(keep.density * 2**32), 2**32 - 1)
            self._lows[m], self._spans[m] = self._chances[m], 0
            if spread and _row(self.output.shape) > 1:
                self._lows[m] = round((keep.density - spread) * 2**32)
                self._spans[m] = round(2 * spread * 2**32)
            self._rules[m] = kernels.KEEP_GIVEN if self._run else kernels.KEEP_RANDOM

    def _rescale_by_density(self, m: int, keep: KeepRule) -> None:
        """One over the share kept. Where gains are given at random, they contain it already."""
        if self._known[m] > 0:
            self._scales[m] = self.size / self._known[m]
        elif isinstance(keep, RandomKeep | RankKeep) and self._rules[m] == self.kernels.KEEP_RANDOM:
            self._scales[m] = 1 / keep.density

    def _group_counts(self) -> list[int]:
        """How many entries each model with groups keeps: what it asks for, or what the models before it have left."""
        wanted = [keep for keep in self._merge.keep if isinstance(keep, GroupTop) and keep.n > 0]
        counts = [0] * len(wanted)
        for i in range(len(wanted)):
            for length, groups in ((wanted[i].m, self.size // wanted[i].m), (self.size % wanted[i].m, 1)):
                before = sum(keep.of(length) for keep in wanted[:i])
                counts[i] += groups * min(wanted[i].of(length), max(length - before, 0))
        return counts

    def begin(self, phase: int, index: int) -> Any:
        """Private histograms of one range, or what it needs to choose entries."""
        step = self._steps[phase]
        n = len(self.readers)
        if step == "coarse":
            assert self._coarse is not None
            return np.zeros_like(self._coarse)
        if step == "fine":
            tables = 2 if self._is_band.any() else 1
            self._fine[index] = np.zeros((tables, n, self.kernels.FINE_BINS), np.uint32)
            return self._fine[index]
        block = min(self.block, self.ranges[index][1]) if self._run else 0
        row = _row(self.output.shape) if self._spans.any() else 0
        return _Choice(self._quota[index].copy(), np.zeros((n, block), np.float32), np.empty((2, row), np.uint64))

    def observe(self, phase: int, index: int, state: Any, rows: np.ndarray, at: int, count: int) -> None:
        step = self._steps[phase]
        if step == "coarse":
            self.kernels.coarse_histogram(rows, self.codes, 0, self._is_top, count, state)
        elif step == "fine":
            for table, wanted, bins in zip(state, (self._is_top, self._is_band), self._bins, strict=False):
                self.kernels.fine_histogram(rows, self.codes, 0, wanted, bins, count, table)
        else:
            self._add_norms(index, state, self._rescaled, rows, at, count)

    def _add_norms(self, index: int, state: _Choice, wanted: np.ndarray, rows: np.ndarray, at: int, count: int) -> None:
        """Lengths of the deltas before and after the keep rules, and how many entries these keep."""
        self._choose(state, rows, at, count)
        if self._masks is not None:
            for m in np.flatnonzero(self._is_ranked):
                self._masks[m, at // 8 : -(-(at + count) // 8)] = np.packbits(state.gains[m, :count] > 0)
        self.kernels.kept_norms(
            rows, self.codes, 0, wanted, self._rules, self._thresholds, state.quota, self._chances, self._keys,
            state.gains, self.align, at, count, self._norms[index],
        )  # fmt: skip
        self._seen[index] += count

    def _recall(self, state: _Choice, at: int, count: int) -> None:
        """Set the gains of a block from the masks of the phase before."""
        assert self._masks is not None
        for m in np.flatnonzero(self._is_ranked):
            bits = self._masks[m, at // 8 : -(-(at + count) // 8)]
            state.gains[m, :count] = np.unpackbits(bits, count=count)

    def _choose(self, state: _Choice, rows: np.ndarray, at: int, count: int) -> None:
        """Set the gains of a block, for the rules that look at whole rows or groups."""
        if self._is_ranked.any():
            self.kernels.rank_gains(
                rows, self.codes, 0, self._is_ranked, self._lows, self._spans, self._keys, max(state.work.shape[1], 1),
                self._merge.rescale == "density", at, count, state.work, state.gains,
            )  # fmt: skip
        if self._is_grouped.any():
            self.kernels.group_gains(rows, self.codes, 0, self._is_grouped, self._picks, self._run, count, state.gains)

    def merge(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray, code: int) -> bool:
        if self._masks is None:
            self._choose(state, rows, at, count)
        else:
            self._recall(state, at, count)
        finite = self.kernels.sparse_sum(
            rows, self.codes, 0, self._rules, self._thresholds, state.quota, self._chances, self._keys, state.gains,
            self._weights, self._scales, self._elect, self._merge.normalize, self._factor, at, count, out, code,
        )  # fmt: skip
        return bool(finite)

    def watch(self, index: int, state: Any, rows: np.ndarray, at: int, count: int) -> None:
        """Count what random rules keep, where no phase before has done so."""
        unknown = self._unknown()
        if unknown.any():
            self._add_norms(index, state._replace(quota=state.quota.copy()), unknown, rows, at, count)

    def _unknown(self) -> np.ndarray:
        """The models whose number of kept entries neither their rule nor the norms tell."""
        unknown = (self._known < 0) & ~self._rescaled
        unknown[self.base] = False
        return unknown

    def exact(self) -> Mapping[str, Any]:
        """The share of entries that each model keeps, unless it is known from a sample only."""
        return {} if self._unknown().any() else {"kept": self._kept()}

    def figures(self) -> Mapping[str, Any] | None:
        figures = super().figures()
        return figures if figures is None else {**figures, "kept": self._kept()}

    def _kept(self) -> list[float]:
        """The share of entries that each model but the base keeps."""
        seen = max(int(self._seen.sum()), 1)
        counted = self._norms[:, :, 2].sum(axis=0) / seen
        shares = np.where(self._known < 0, counted, self._known / max(self.size, 1))
        return [float(f"{share:.6g}") for share in shares[1:]]

    def end(self, phase: int, index: int, state: Any) -> None:
        """Add a range's coarse histogram to the tensor's; whole numbers, so the order does not matter."""
        if self._steps[phase] == "coarse":
            with self._lock:
                self._coarse += state

    def reduce(self, phase: int) -> None:
        step = self._steps[phase]
        if step == "coarse":
            assert self._coarse is not None
            for edge, wanted in ((_LOW, self._is_top), (_HIGH, self._is_band)):
                for m in np.flatnonzero(wanted):
                    place = locate(self._coarse[m], int(self._counts[edge, m]))
                    self._bins[edge, m], self._counts[edge, m] = place
            self._coarse = None
        elif step == "fine":
            self._set_thresholds(_LOW, self._is_top)
            self._set_thresholds(_HIGH, self._is_band)
            self._fine = [None] * len(self.ranges)
        elif step == "norms":
            before, after, _ = self._norms.sum(axis=0).T
            for m in np.flatnonzero(self._rescaled):
                if before[m] != 0 and after[m] != 0:  # true of what is not finite, which must show in the result
                    with np.errstate(invalid="ignore"):
                        self._scales[m] = before[m] / after[m]
        super().reduce(phase)

    def _set_thresholds(self, edge: int, wanted: np.ndarray) -> None:
        """A k-th magnitude of each model, and how many of each range's entries equal to it are among the k largest.

        These are the ones of lower index.
        """
        fine = [f for f in self._fine if f is not None]
        for m in np.flatnonzero(wanted):
            total = np.zeros(self.kernels.FINE_BINS, np.int64)
            for histogram in fine:
                total += histogram[edge, m]
            low, left = locate(total, int(self._counts[edge, m]))
            self._thresholds[edge, m] = (int(self._bins[edge, m]) << 16) | low
            for index, histogram in enumerate(fine):
                share = min(left, int(histogram[edge, m, low]))
                self._quota[index, edge, m] = share
                left -= share


def _mask_bytes(merge: SparseMerge, size: int) -> int:
    """The bytes of the masks of ranked rows, a bit an entry; 0 where they are needed once, or too many."""
    nbytes = (len(merge.keep) + 1) * -(-size // 8)
    is_twice = merge.rescale == "l1" and any(isinstance(keep, RankKeep) for keep in merge.keep)
    return nbytes if is_twice and nbytes <= _MASK_BYTES else 0


def _selects(keep: KeepRule) -> bool:
    """Whether a rule needs the k-th magnitude of the whole tensor."""
    return isinstance(keep, TopMagnitude | MagnitudeBand) and 0 < keep.density < 1


def _row(shape: tuple[int, ...]) -> int:
    """The entries that are ranked together: those behind one index of the first axis, or all of a vector."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def _run(merge: SparseMerge, shape: tuple[int, ...]) -> int:
    """How many entries must be seen together to choose among them; 0 where each can be judged by itself."""
    groups = [keep.m for keep in merge.keep if isinstance(keep, GroupTop)]
    if groups:
        return groups[0]
    ranks = any(isinstance(keep, RankKeep) and keep.epsilon and 0 < keep.density < 1 for keep in merge.keep)
    return row if ranks and (row := _row(shape)) > 1 else 0


def _alignment(run: int, size: int) -> int:
    """Where blocks may begin: at whole runs, and at places that checksums take; the tensor's size for one run."""
    unit = -(-size // 8) * 8 if run >= size else math.lcm(run, 8)
    return unit if run >= size else -(-work.ALIGNMENT // unit) * unit
