"""One output tensor as work: fixed ranges of elements, in one or more phases, on any number of threads.

The unit of work is a range of one tensor in one phase. Ranges depend on the tensor's size only; a phase's partial
results are kept by range and reduced in order of the ranges, so the result does not depend on who computed what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mergekit.errors import IncompatibleError, NonFiniteError
from mergekit.execute.inputs import Inputs, Reader
from mergekit.planning.plan import Apply, Cast, Identical, OutputTensor

__all__ = ["Buffers", "Sink", "Work", "split"]

RANGE = 1 << 21
"""Elements of a range, unless that would make more than ``MOST_RANGES`` of them."""
MOST_RANGES = 16
ALIGNMENT = 4096
"""Ranges and blocks start at multiples of this: whole pages, and whole reduction and random-number groups."""
PAGE = 4096
BLOCK_BYTES = 1 << 20
"""Bytes of all inputs and the output of one block, about: they should stay in the processor's cache."""
_LEAST_BLOCK = 1 << 14


class Sink(Protocol):
    """Where results go: bytes at their final places, and word of each tensor that is complete."""

    def write(self, output: OutputTensor, start: int, data: np.ndarray) -> None:
        """Write ``data`` (uint8) at byte ``start`` of a tensor. Called by any thread."""
        ...

    def finish(self, output: OutputTensor, checksum: int) -> None:
        """All bytes of a tensor are written. Called by any thread."""
        ...

    def note(self, text: str) -> None:
        """Something to tell the user at the end."""
        ...


class Buffers:
    """Scratch memory of one worker, grown to the largest block and reused.

    Some processors copy at a fifth of their speed when the destination starts a few bytes after the source modulo
    the page size. So the caller gives the places in files (modulo ``PAGE``) that memory will be copied from or to,
    and gets memory that starts elsewhere.
    """

    def __init__(self) -> None:
        self._rows = np.empty(0, np.uint8)
        self._out = np.empty(0, np.uint8)

    def rows(self, count: int, nbytes: int, sources: Sequence[int]) -> np.ndarray:
        """uint8 [count, nbytes] to be filled from file offsets ``sources``; rows are whole pages apart."""
        stride = -(-nbytes // PAGE) * PAGE
        if self._rows.size < count * stride + 2 * PAGE:
            self._rows = np.empty(count * stride + 2 * PAGE, np.uint8)
        start = _start(self._rows, lambda phase: min(((phase - source) % PAGE for source in sources), default=PAGE))
        return self._rows[start : start + count * stride].reshape(count, stride)

    def out(self, nbytes: int, target: int) -> np.ndarray:
        """uint8 [nbytes] to be written to file offset ``target``."""
        if self._out.size < nbytes + 2 * PAGE:
            self._out = np.empty(nbytes + 2 * PAGE, np.uint8)
        start = _start(self._out, lambda phase: (target - phase) % PAGE)
        return self._out[start : start + nbytes]


def _start(memory: np.ndarray, distance: Callable[[int], int]) -> int:
    """Where in ``memory`` to start: at a multiple of 64 bytes whose phase (address modulo the page) is far enough."""
    address = memory.ctypes.data
    first = -address % 64
    for start in range(first, first + PAGE, 64):
        if distance((address + start) % PAGE) >= 64:
            return start
    return first  # so many inputs that every phase is near one of them


def split(size: int) -> tuple[tuple[int, int], ...]:
    """The ranges (start, count) of a tensor of ``size`` elements: at most 16, each a multiple of 4,096 but the last.

    >>> split(10)
    ((0, 10),)
    """
    length = max(RANGE, -(-size // MOST_RANGES))
    length = -(-length // ALIGNMENT) * ALIGNMENT
    return tuple((start, min(length, size - start)) for start in range(0, size, length))


class Work:
    """The computation of one output tensor. Subclasses define ``phases`` and what each does."""

    phases = 1

    def __init__(
        self, output: OutputTensor, readers: Sequence[Reader], kernels: Any, sink: Sink, block: int | None
    ) -> None:
        self.output, self.readers, self.kernels, self.sink = output, tuple(readers), kernels, sink
        self.size = output.nbytes // output.dtype.size
        self.ranges = split(self.size)
        self.widest = max((r.dtype.size for r in self.readers), default=1)
        per_element = sum(r.dtype.size for r in self.readers) + output.dtype.size
        wanted = block or max(_LEAST_BLOCK, getattr(kernels, "block_bytes", BLOCK_BYTES) // per_element)
        self.block = max(ALIGNMENT, wanted // ALIGNMENT * ALIGNMENT)
        self.codes = np.array([kernels.CODES.get(r.dtype, -1) for r in self.readers], np.int64)
        self._sums = [0] * len(self.ranges)

    def run(self, phase: int, index: int, buffers: Buffers) -> None:
        """Do one phase of one range."""
        start, count = self.ranges[index]
        state = self.begin(phase, index)
        last = phase == self.phases - 1
        size = self.output.dtype.size
        sources = [(reader.offset + start * reader.dtype.size) % PAGE for reader in self.readers if reader.offset >= 0]
        rows = buffers.rows(len(self.readers), self.block * self.widest, sources)
        target = (self.output.offset + start * size) % PAGE
        for at in range(start, start + count, self.block):
            length = min(self.block, start + count - at)
            for reader, row in zip(self.readers, rows, strict=True):
                reader.read(at, length, row)
            if not last:
                self.observe(phase, index, state, rows, at, length)
                continue
            out = buffers.out(length * size, target)
            self.compute(state, rows, at, length, out)
            self.sink.write(self.output, at * size, out)
            self._sums[index] += self.kernels.checksum(out, at * size)
        self.end(phase, index, state)

    def begin(self, phase: int, index: int) -> Any:
        """The private state of one range in one phase."""

    def observe(self, phase: int, index: int, state: Any, rows: np.ndarray, at: int, count: int) -> None:
        """Gather statistics of a block, in a phase before the last."""

    def compute(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray) -> None:
        """Compute a block of the result into ``out`` (uint8)."""
        raise AssertionError("each kind of work computes something")

    def end(self, phase: int, index: int, state: Any) -> None:
        """Keep what a range found, after its last block."""

    def reduce(self, phase: int) -> None:
        """Bring the ranges' partial results of a phase together; after the last phase, report the tensor."""
        if phase == self.phases - 1:
            self.sink.finish(self.output, sum(self._sums) & ((1 << 64) - 1))


class CopyWork(Work):
    """The bytes of one input as they are."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._finite = True

    def compute(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray) -> None:
        out[:] = rows[0, : len(out)]
        if self.codes[0] >= 0 and not self.kernels.all_finite(out, self.codes[0], count):
            self._finite = False

    def reduce(self, phase: int) -> None:
        super().reduce(phase)
        if not self._finite:
            self.sink.note(f"{self.output.name} is a copy of a tensor that holds NaN or infinity")


class IdenticalWork(Work):
    """Integer tensors that must agree."""

    def __init__(self, names: Sequence[str], *args: Any) -> None:
        super().__init__(*args)
        self._names = names

    def compute(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray) -> None:
        out[:] = rows[0, : len(out)]
        for row, name in zip(rows[1:], self._names[1:], strict=True):
            if not np.array_equal(row[: len(out)], out):
                raise IncompatibleError(
                    f"cannot merge {self.output.name}: this {self.output.dtype} tensor differs between "
                    f"{self._names[0]} and {name}, and integers are never averaged"
                )


class FloatWork(Work):
    """Work whose result is computed in float32 and must be finite (unless the user allows otherwise)."""

    def __init__(self, allow_nonfinite: bool, *args: Any) -> None:
        super().__init__(*args)
        self.out_code = int(self.kernels.CODES[self.output.dtype])
        self._allow, self._noted = allow_nonfinite, False

    def check(self, finite: bool) -> None:
        """Stop the merge, or note it once, if a block came out with NaN or infinity."""
        if finite:
            return
        if not self._allow:
            hint = "" if self.output.dtype.code != "F16" else " (float16 overflows beyond 65504; try dtype: bfloat16)"
            raise NonFiniteError(
                f"tensor {self.output.name} came out with NaN or infinity{hint}; check its inputs, "
                f"or pass --allow-nonfinite to go on"
            )
        if not self._noted:
            self._noted = True
            self.sink.note(f"{self.output.name} came out with NaN or infinity (--allow-nonfinite)")


class CastWork(FloatWork):
    """One input in another element type."""

    def compute(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray) -> None:
        one = np.ones(1, np.float32)
        self.check(self.kernels.weighted_sum(rows, self.codes, one, count, out, self.out_code))


def copy_or_cast(
    output: OutputTensor, inputs: Inputs, kernels: Any, sink: Sink, allow_nonfinite: bool, block: int | None,
    names: Sequence[str],
) -> Work | None:  # fmt: skip
    """The work for an expression that is not a merge; None if it is one."""
    expression = output.expression
    if isinstance(expression, Apply):
        return None
    if isinstance(expression, Identical):
        readers = [inputs.reader(read) for read in expression.inputs]
        labels = [names[read.source] for read in expression.inputs]
        return IdenticalWork(labels, output, readers, kernels, sink, block)
    if isinstance(expression, Cast):
        return CastWork(allow_nonfinite, output, [inputs.reader(expression.input)], kernels, sink, block)
    return CopyWork(output, [inputs.reader(expression)], kernels, sink, block)
