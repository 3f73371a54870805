"""Work whose result is computed in float32: rounded once, held to be finite, and looked at on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mergekit.dtypes import F32
from mergekit.errors import NonFiniteError
from mergekit.execute.buffers import Buffers
from mergekit.execute.statistics import Tally
from mergekit.execute.work import Job, Work
from mergekit.methods import Method, get_method
from mergekit.methods.guard import guarded
from mergekit.planning.expression import Apply
from mergekit.seeds import stream_key

__all__ = ["FloatWork", "MergeWork", "guard"]

_PIECES, _LEAST_PIECE, _MOST_PIECE = 4, 1 << 13, 1 << 16
"""A sample has at least so many pieces, of so many elements: shorter ones would cut blocks into small reads."""
_EVERY = 16
"""One piece of so many is looked at ..."""
_SMALL = 1 << 18
"""... unless the tensor has at most so many elements: then all of them are."""


class FloatWork(Work):
    """Work that computes float32 numbers and stores them in the output's type. Subclasses define ``merge``.

    ``base`` is the reader of the base model, -1 where the result is no base plus deltas.
    """

    base = -1

    def __init__(self, job: Job, align: int | None = None) -> None:
        super().__init__(job, align)
        self.out_code = int(self.kernels.CODES[self.output.dtype])
        self._noted = False
        self._nonfinite = [0] * len(self.ranges)
        self._is_stochastic = job.rounding == "stochastic" and self.output.dtype.size < F32.size
        self._key = stream_key(job.seed, self.output.name, -1)
        piece = min(max(self.size // (_EVERY * _PIECES), _LEAST_PIECE), _MOST_PIECE)
        self._piece = max(piece // self.align, 1) * self.align
        self._stride = 1 if self.size <= _SMALL else _EVERY
        self._tally = Tally(len(self.readers), len(self.ranges)) if job.statistics else None

    def merge(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray, code: int) -> bool:
        """Compute a block of the result into ``out`` (uint8) in the element type ``code``; whether all is finite."""
        raise AssertionError("each kind of work merges in its own way")

    def blocks(self, start: int, count: int, last: bool) -> Iterator[tuple[int, int]]:
        """The blocks of a range; in the last phase cut where pieces of the sample begin and end."""
        for at, length in super().blocks(start, count, last):
            end = at + length
            while at < end:
                stop = min(end, self._edge(at)) if last and self._tally else end
                yield at, stop - at
                at = stop

    def _edge(self, at: int) -> int:
        """Where the sample next begins or ends after element ``at``."""
        piece = at // self._piece
        return (piece + 1 if self._is_watched(at) else (piece // _EVERY + 1) * _EVERY) * self._piece

    def _is_watched(self, at: int) -> bool:
        return self._tally is not None and (self._stride == 1 or at // self._piece % self._stride == 0)

    def compute(
        self, index: int, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray, buffers: Buffers
    ) -> None:
        watched = self._is_watched(at)
        if not watched and not self._is_stochastic:
            self._check(self.merge(state, rows, at, count, out, self.out_code), index, out, count)
            return
        values = buffers.values(count)
        if watched:
            self.watch(index, state, rows, at, count)
        finite = self.merge(state, rows, at, count, values.view(np.uint8), self.kernels.CODES[F32])
        if self._is_stochastic:
            finite &= self.kernels.round_stochastically(values, count, out, self.out_code, at, *self._key)
        else:
            finite &= self.kernels.store(values, count, out, self.out_code)
        self._check(bool(finite), index, out, count)
        if watched and self._tally is not None:
            self._tally.add(self.kernels, rows, self.codes, self.base, values, out, self.out_code, count, index)

    def watch(self, index: int, state: Any, rows: np.ndarray, at: int, count: int) -> None:
        """Gather what only this form can tell about a block of the sample, before it is merged."""

    def exact(self) -> Mapping[str, Any]:
        """Statistics that this form knows for the whole tensor, under the names of ``Tally.record``."""
        return {}

    def figures(self) -> Mapping[str, Any] | None:
        if self._tally is None:
            return None
        return self._tally.record(self.size, self.base, self.exact(), sum(self._nonfinite))

    def _check(self, finite: bool, index: int, out: np.ndarray, count: int) -> None:
        """Stop the merge, or note it once, if a block came out with NaN or infinity."""
        if finite:
            return
        if not self.job.allow_nonfinite:
            hint = "" if self.output.dtype.code != "F16" else " (float16 overflows beyond 65504; try dtype: bfloat16)"
            raise NonFiniteError(
                f"tensor {self.output.name} came out with NaN or infinity{hint}; check its inputs, "
                f"or pass --allow-nonfinite to go on"
            )
        self._nonfinite[index] += self.kernels.count_nonfinite(out, self.out_code, count)
        if not self._noted:
            self._noted = True
            self.sink.note(self.output.name, "came out with NaN or infinity (--allow-nonfinite)")


def guard(apply: Apply, job: Job) -> Method:
    """The method of ``apply``, held to what its form says."""
    method = get_method(apply.method)
    return guarded(method, job.output.name, len(job.readers) - (apply.has_base and method.form.space == "deltas"))


class MergeWork(FloatWork):
    """A merge method applied to tensors. Each form of method has a subclass."""

    def __init__(self, apply: Apply, job: Job, align: int | None = None) -> None:
        super().__init__(job, align)
        self.apply, self.method = apply, guard(apply, job)
        self.parameters = dict(apply.parameters)
        self.base = 0 if apply.has_base else -1

    @classmethod
    def held(cls, apply: Apply, shape: tuple[int, ...], threads: int) -> int:
        """Bytes that merging a tensor of ``shape`` holds at once, besides the buffers of blocks."""
        return 0

    @classmethod
    def compiled(cls, apply: Apply) -> tuple[str, ...]:
        """The families of compiled kernels that the work calls, as ``kernels.warmup`` names them."""
        return ("span",)
