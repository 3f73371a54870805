"""Work that merges nothing: bytes as they are, tensors that must agree, one tensor in another element type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergekit.errors import IncompatibleError
from mergekit.execute.buffers import Buffers
from mergekit.execute.float_work import FloatWork
from mergekit.execute.work import Job, Work

__all__ = ["CastWork", "CopyWork", "IdenticalWork"]


class CopyWork(Work):
    """The bytes of one input as they are."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._finite = True

    def compute(
        self, index: int, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray, buffers: Buffers
    ) -> None:
        out[:] = rows[0, : len(out)]
        if self.codes[0] >= 0 and not self.kernels.all_finite(out, self.codes[0], count):
            self._finite = False

    def reduce(self, phase: int) -> None:
        super().reduce(phase)
        if not self._finite:
            self.sink.note(self.output.name, "is a copy of a tensor that holds NaN or infinity")


class IdenticalWork(Work):
    """Integer tensors that must agree. ``names`` are the models, for messages."""

    def __init__(self, job: Job, names: Sequence[str]) -> None:
        super().__init__(job)
        self._names = names

    def compute(
        self, index: int, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray, buffers: Buffers
    ) -> None:
        out[:] = rows[0, : len(out)]
        for row, name in zip(rows[1:], self._names[1:], strict=True):
            if not np.array_equal(row[: len(out)], out):
                raise IncompatibleError(
                    f"cannot merge {self.output.name}: this {self.output.dtype} tensor differs between "
                    f"{self._names[0]} and {name}, and integers are never averaged"
                )


class CastWork(FloatWork):
    """One input in another element type."""

    def merge(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray, code: int) -> bool:
        return bool(self.kernels.weighted_sum(rows, self.codes, np.ones(1, np.float32), count, out, code))
