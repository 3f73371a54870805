"""Scratch memory of a worker, placed where copies are fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["PAGE", "Buffers"]

PAGE = 4096


class Buffers:
    """Scratch memory of one worker, grown to the largest block and reused.

    Some processors copy at a fifth of their speed when the destination starts a few bytes after the source modulo
    the page size. So the caller gives the places in files (modulo ``PAGE``) that memory will be copied from or to,
    and gets memory that starts elsewhere.
    """

    def __init__(self) -> None:
        self._rows = np.empty(0, np.uint8)
        self._out = np.empty(0, np.uint8)
        self._values = np.empty(0, np.float32)

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

    def values(self, count: int) -> np.ndarray:
        """float32 [count]. (New memory for each block would be mapped, cleared and given back each time.)"""
        if self._values.size < count:
            self._values = np.empty(count, np.float32)
        return self._values[:count]


def _start(memory: np.ndarray, distance: Callable[[int], int]) -> int:
    """Where in ``memory`` to start: at a multiple of 64 bytes whose phase (address modulo the page) is far enough."""
    address = memory.ctypes.data
    first = -address % 64
    for start in range(first, first + PAGE, 64):
        if distance((address + start) % PAGE) >= 64:
            return start
    return first  # so many inputs that every phase is near one of them
