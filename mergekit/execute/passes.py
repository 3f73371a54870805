"""The passes over a tensor that an elementwise method takes: compiled to one loop, or chunk by chunk with arrays."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from mergekit.errors import UsageError
from mergekit.kernels import fused
from mergekit.kernels.elementwise import ALL
from mergekit.kernels.fused import Fused
from mergekit.kernels.trace import UntraceableError, record
from mergekit.methods import Elementwise, Method, get_method
from mergekit.planning.expression import Apply

__all__ = ["Passes", "passes"]


class Passes(Protocol):
    """What is done to a block: ``rows`` uint8 [models, bytes] as stored, ``count`` elements.

    ``threshold`` is the bits of the smallest key that is selected, ``ALL`` if everything is; of the keys that equal it
    the first ``left`` are selected, and what remains of ``left`` is returned.
    """

    align: int | None
    """Sums are the same for blocks that start at multiples of it; None: at multiples of ``work.ALIGNMENT``."""

    def count_upper(self, rows: np.ndarray, count: int, totals: np.ndarray) -> int:
        """Count keys by their upper bits (see ``kernels.elementwise``); how many are not zero."""
        ...

    def count_lower(self, rows: np.ndarray, count: int, upper: int, totals: np.ndarray) -> None:
        """Count keys by their lower bits, of those with the given upper ones."""
        ...

    def measure(
        self, rows: np.ndarray, count: int, threshold: int, left: int, sums: np.ndarray | None
    ) -> tuple[int, np.ndarray]:
        """``sums`` (float64 [m], None before the first block) with those of the block added."""
        ...

    def merge(
        self, rows: np.ndarray, count: int, threshold: int, left: int, out: np.ndarray, code: int
    ) -> tuple[int, bool]:
        """The result, rounded into ``out``; whether it is finite."""
        ...

    def measured(self, sums: np.ndarray) -> Passes:
        """The same with the sums over the tensor, which ``merge`` needs where there is a ``measure``."""
        ...


def passes(apply: Apply, method: Method, tensor: str, kernels: Any, codes: np.ndarray) -> Passes:
    """The passes of a merge of inputs in the types ``codes`` to ``tensor``; ``method`` is its method, ``guarded``."""
    chunks = _ChunkPasses(apply, method, tensor, kernels, codes)
    try:
        # Without the guard, which looks at arrays. What it refuses can't be recorded.
        return _FusedPasses(chunks, get_method(apply.method))
    except UntraceableError:
        return chunks


class _ChunkPasses:
    """The method's functions called with arrays of ``CHUNK`` elements, of the module that the back end computes with.

    Chunks start at multiples of their size from the start of a range, whatever the blocks, so sums are the same too.
    """

    def __init__(self, apply: Apply, method: Method, tensor: str, kernels: Any, codes: np.ndarray) -> None:
        assert isinstance(method.form, Elementwise)
        self.tensor = tensor
        self.method, self.form, self.kernels, self.codes = method, method.form, kernels, codes
        self.parameters, self.scale = dict(apply.parameters), apply.scale
        self.base = 0 if apply.has_base and method.form.space == "deltas" else -1
        self.align: int | None = kernels.CHUNK
        self.extra: tuple[Any, ...] = ()
        self._xp = kernels.arrays()
        self._memory = threading.local()
        self._lock = threading.Lock()
        self._number: int | None = None

    def count_upper(self, rows: np.ndarray, count: int, totals: np.ndarray) -> int:
        return sum(self.kernels.count_upper(self._keys(x), totals) for _, _, x in self._chunks(rows, count))

    def count_lower(self, rows: np.ndarray, count: int, upper: int, totals: np.ndarray) -> None:
        for _, _, x in self._chunks(rows, count):
            self.kernels.count_lower(self._keys(x), upper, totals)

    def measure(
        self, rows: np.ndarray, count: int, threshold: int, left: int, sums: np.ndarray | None
    ) -> tuple[int, np.ndarray]:
        assert self.form.measure is not None
        for _, _, x in self._chunks(rows, count):
            x, left = self._selected(x, threshold, left)
            with np.errstate(all="ignore"):
                found = self.form.measure(self._xp, x, **self.parameters)
            part = np.asarray(self.kernels.on_host(found), np.float64)
            with self._lock:
                self._number = len(part) if self._number is None else self._number
            if len(part) != self._number:
                raise UsageError(
                    f"method '{self.method.name}' on tensor {self.tensor}: its 'measure' returns {self._number} sums "
                    f"for one chunk and {len(part)} for another; their number must not depend on the data"
                )
            sums = part if sums is None else sums + part
        assert sums is not None, "blocks are not empty"
        return left, sums

    def merge(
        self, rows: np.ndarray, count: int, threshold: int, left: int, out: np.ndarray, code: int
    ) -> tuple[int, bool]:
        finite, width = True, out.nbytes // count
        for start, origin, x in self._chunks(rows, count):
            x, left = self._selected(x, threshold, left)
            with np.errstate(all="ignore"):
                result = self.method.function(self._xp, x, *self.extra, **self.parameters)
                if self.scale != 1:
                    result = result * self.scale
                if origin is not None:
                    result = result + origin
            values = np.ascontiguousarray(self.kernels.on_host(result), np.float32)
            finite &= bool(self.kernels.store(values, len(values), out[start * width :], code))
        return left, finite

    def measured(self, sums: np.ndarray) -> Passes:
        self.extra = (sums,)
        return self

    def _chunks(self, rows: np.ndarray, count: int) -> Iterator[tuple[int, Any, tuple[Any, ...]]]:
        """The chunks of a block: start in the block, the base (None if it is not to be added), the arrays."""
        if not hasattr(self._memory, "scratch"):
            self._memory.scratch = np.empty((len(self.codes), self.kernels.CHUNK), np.float32)
        for start in range(0, count, self.kernels.CHUNK):
            length = min(self.kernels.CHUNK, count - start)
            x = self.kernels.load_chunk(rows, self.codes, self.base, start, length, self._memory.scratch)
            yield (start, None, x) if self.base < 0 else (start, x[0], x[1:])

    def _keys(self, x: tuple[Any, ...]) -> Any:
        assert self.form.key is not None
        with np.errstate(all="ignore"):
            return self._xp.asarray(self.form.key(self._xp, x, **self.parameters), dtype=self._xp.float32)

    def _selected(self, x: tuple[Any, ...], threshold: int, left: int) -> tuple[tuple[Any, ...], int]:
        """The arrays with zeros where the key is not among the largest; of ties, the first are."""
        if threshold == ALL:
            return x, left
        selected: tuple[tuple[Any, ...], int] = self.kernels.keep_largest(x, self._keys(x), threshold, left)
        return selected


class _FusedPasses:
    """The method's functions compiled to loops over elements. Raises UntraceableError for those that can't be."""

    align: int | None = None

    def __init__(self, chunks: _ChunkPasses, method: Method) -> None:
        form = method.form
        assert isinstance(form, Elementwise)
        self._chunks, self._method, self._fuse = chunks, method, chunks.kernels.fuse
        self._count, parameters = len(chunks.codes) - (chunks.base >= 0), chunks.parameters
        self._key: Fused | None = self._fuse(form.key, self._count, (), parameters) if form.key else None
        self._terms: Fused | None = (
            self._fuse(form.measure, self._count, (), parameters, sums=True) if form.measure else None
        )
        # Whether the function can be compiled is told before the sums are known: they are numbers, whatever they are.
        sums = (np.arange(1.0, self._terms.results + 1),) if self._terms else ()
        self._function: Fused = self._fuse(method.function, self._count, sums, parameters)
        self._inputs = (chunks.codes, chunks.base)

    def count_upper(self, rows: np.ndarray, count: int, totals: np.ndarray) -> int:
        key = self._key
        assert key is not None
        return int(fused.upper_pass(rows, *self._inputs, count, key.address, key.scalars, totals))

    def count_lower(self, rows: np.ndarray, count: int, upper: int, totals: np.ndarray) -> None:
        key = self._key
        assert key is not None
        fused.lower_pass(rows, *self._inputs, count, key.address, key.scalars, upper, totals)

    def measure(
        self, rows: np.ndarray, count: int, threshold: int, left: int, sums: np.ndarray | None
    ) -> tuple[int, np.ndarray]:
        terms, key = self._terms, self._key or self._terms  # without a key all are selected, and it is not called
        assert terms is not None
        assert key is not None
        sums = np.zeros(terms.results) if sums is None else sums
        left = fused.sums_pass(
            rows, *self._inputs, count, terms.address, terms.scalars, key.address, key.scalars, threshold, left, sums
        )
        return int(left), sums

    def merge(
        self, rows: np.ndarray, count: int, threshold: int, left: int, out: np.ndarray, code: int
    ) -> tuple[int, bool]:
        function, key, scale = self._function, self._key or self._function, np.float32(self._chunks.scale)
        left, finite = fused.merge_pass(
            rows, *self._inputs, count, function.address, function.scalars, key.address, key.scalars, threshold, left,
            scale, out, code,
        )  # fmt: skip
        return int(left), bool(finite)

    def measured(self, sums: np.ndarray) -> Passes:
        # Where sums decide what the function does, each tensor would be compiled anew.
        try:
            trace = record(self._method.function, self._count, (sums,), self._chunks.parameters)
        except UntraceableError:
            return self._chunks.measured(sums)
        if trace.program != self._function.program:
            return self._chunks.measured(sums)
        self._function = replace(self._function, scalars=trace.scalars)
        return self
