"""One output tensor as work: fixed ranges of elements, in one or more phases, on any number of threads.

The unit of work is a range of one tensor in one phase. Ranges depend on the tensor's size only; a phase's partial
results are kept by range and reduced in order of the ranges, so the result does not depend on who computed what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mergekit.execute.buffers import PAGE, Buffers
from mergekit.execute.inputs import Reader
from mergekit.planning.plan import OutputTensor

__all__ = ["Job", "Sink", "Work", "split"]

RANGE = 1 << 21
"""Elements of a range, unless that would make more than ``MOST_RANGES`` of them."""
MOST_RANGES = 16
ALIGNMENT = 4096
"""Ranges and blocks start at multiples of this: whole pages, and whole reduction and random-number groups."""
BLOCK_BYTES = 1 << 20
"""Bytes of all inputs and the output of one block, about: they should stay in the processor's cache."""
_LEAST_BLOCK = 1 << 14


class Sink(Protocol):
    """Where results go: bytes at their final places, and word of each tensor that is complete."""

    def write(self, output: OutputTensor, start: int, data: np.ndarray) -> None:
        """Write ``data`` (uint8) at byte ``start`` of a tensor. Called by any thread."""
        ...

    def finish(self, output: OutputTensor, checksum: int, figures: Mapping[str, Any] | None) -> None:
        """All bytes of a tensor are written; ``figures`` are its statistics. Called by any thread."""
        ...

    def note(self, tensor: str, text: str) -> None:
        """Something about ``tensor`` to tell the user at the end; the text goes on after its name."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What any work is given: the tensor to make, where its inputs come from and where it goes, and how.

    ``block`` overrides the elements per block. ``rounding`` is ``nearest`` or ``stochastic``; ``statistics``: gather
    figures about the tensor on the way.
    """

    output: OutputTensor
    readers: tuple[Reader, ...]
    kernels: Any
    sink: Sink
    block: int | None = None
    allow_nonfinite: bool = False
    seed: int = 0
    rounding: str = "nearest"
    statistics: bool = False


def split(size: int, align: int | None = None) -> tuple[tuple[int, int], ...]:
    """The ranges (start, count) of ``size`` elements: at most 16, each a multiple of ``align`` but the last.

    >>> split(10)
    ((0, 10),)
    """
    align = align or ALIGNMENT
    length = max(RANGE, -(-size // MOST_RANGES))
    length = -(-length // align) * align
    return tuple((start, min(length, size - start)) for start in range(0, size, length))


class Work:
    """The computation of one output tensor. Subclasses define ``phases`` and what each does.

    ``align``: blocks and ranges start at multiples of it; a subclass whose groups of elements must be seen together
    passes their size.
    """

    phases = 1

    def __init__(self, job: Job, align: int | None = None) -> None:
        self.job = job
        self.output, self.readers, self.kernels, self.sink = job.output, job.readers, job.kernels, job.sink
        self.size = self.output.nbytes // self.output.dtype.size
        self.align = align or ALIGNMENT
        self.ranges = split(self.size, self.align)
        self.widest = max((r.dtype.size for r in self.readers), default=1)
        per_element = sum(r.dtype.size for r in self.readers) + self.output.dtype.size
        wanted = job.block or max(_LEAST_BLOCK, getattr(self.kernels, "block_bytes", BLOCK_BYTES) // per_element)
        self.block = max(self.align, wanted // self.align * self.align)
        self.codes = np.array([self.kernels.CODES.get(r.dtype, -1) for r in self.readers], np.int64)
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
        for at, length in self.blocks(start, count, last):
            for reader, row in zip(self.readers, rows, strict=True):
                reader.read(at, length, row)
            if not last:
                self.observe(phase, index, state, rows, at, length)
                continue
            out = buffers.out(length * size, target)
            self.compute(index, state, rows, at, length, out, buffers)
            self.sink.write(self.output, at * size, out)
            self._sums[index] += self.kernels.checksum(out, at * size)
        self.end(phase, index, state)

    def blocks(self, start: int, count: int, last: bool) -> Iterator[tuple[int, int]]:
        """The blocks (start, count) of a range; ``last``: in the last phase."""
        for at in range(start, start + count, self.block):
            yield at, min(self.block, start + count - at)

    def begin(self, phase: int, index: int) -> Any:
        """The private state of one range in one phase."""

    def observe(self, phase: int, index: int, state: Any, rows: np.ndarray, at: int, count: int) -> None:
        """Gather what a block tells, in a phase before the last."""

    def compute(
        self, index: int, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray, buffers: Buffers
    ) -> None:
        """Compute a block of the result, of range ``index``, into ``out`` (uint8)."""
        raise AssertionError("each kind of work computes something")

    def end(self, phase: int, index: int, state: Any) -> None:
        """Keep what a range found, after its last block."""

    def figures(self) -> Mapping[str, Any] | None:
        """The statistics of the finished tensor."""
        return None

    def reduce(self, phase: int) -> None:
        """Bring the ranges' partial results of a phase together; after the last phase, report the tensor."""
        if phase == self.phases - 1:
            self.sink.finish(self.output, sum(self._sums) & ((1 << 64) - 1), self.figures())
