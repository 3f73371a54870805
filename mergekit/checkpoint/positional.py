"""Read and write at a position of an open file, by any number of threads, on systems with and without such calls."""

from __future__ import annotations

import os
import threading

__all__ = ["read_at", "write_at"]

_SEEKING = threading.Lock()
"""Where a file has one position for all threads (Windows), only one thread may move it at a time."""


def read_at(descriptor: int, buffer: memoryview, place: int) -> int:
    """Fill ``buffer`` from byte ``place``; returns the number of bytes read, which may be fewer (0: end of file)."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], place)
    with _SEEKING:
        os.lseek(descriptor, place, os.SEEK_SET)
        raw = os.read(descriptor, len(buffer))
    buffer[: len(raw)] = raw
    return len(raw)


def write_at(descriptor: int, data: memoryview, place: int) -> int:
    """Write ``data`` at byte ``place``; returns the number of bytes written, which may be fewer."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, place)
    with _SEEKING:
        os.lseek(descriptor, place, os.SEEK_SET)
        return os.write(descriptor, data)
