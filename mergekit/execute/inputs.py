"""Read blocks of input tensors: by position from safetensors, through torch from pickles, computed from others."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mergekit.checkpoint.positional import read_at
from mergekit.dtypes import F32, DType
from mergekit.errors import CheckpointError
from mergekit.planning.expression import Leaf, Read
from mergekit.planning.plan import Source

__all__ = ["Inputs", "Reader", "read_floats"]


class Reader(Protocol):
    """Gives the elements of one input tensor, as raw bytes of element type ``dtype``.

    ``offset`` is where they start in their file, -1 if they don't come straight from one.
    """

    dtype: DType
    offset: int

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        """Fill the head of ``row`` (uint8) with elements ``start .. start + count``."""
        ...


def read_floats(reader: Reader, start: int, count: int, out: np.ndarray) -> None:
    """Elements ``start .. start + count`` of any reader into ``out`` (float32 [count], contiguous)."""
    from mergekit.kernels import codec

    if reader.dtype == F32:
        reader.read(start, count, out.view(np.uint8))
        return
    raw = np.empty(count * reader.dtype.size, np.uint8)
    reader.read(start, count, raw)
    codec.decode(raw, codec.CODES[reader.dtype], 0, count, out)


class Inputs:
    """The open files of ``sources``. They are opened when first needed and shared by all threads."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Inputs:
        """Nothing is opened yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def reader(self, leaf: Leaf) -> Reader:
        """A reader for a leaf of an expression."""
        if not isinstance(leaf, Read):
            from mergekit.execute.derived import derived_reader

            return derived_reader(self, leaf)
        if self._sources[leaf.source].pickled:
            return _PickleReader(self.path(leaf), leaf)
        return _FileReader(self._open(self.path(leaf)), leaf, self.path(leaf))

    def path(self, read: Read) -> Path:
        """The file that holds a tensor."""
        return Path(self._sources[read.source].folder) / read.info.file

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                try:
                    self._files[path] = os.open(
                        path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
                    )
                except OSError as error:
                    raise CheckpointError(f"cannot open {path}: {error.strerror}") from None
            return self._files[path]


class _FileReader:
    def __init__(self, descriptor: int, read: Read, path: Path) -> None:
        self.dtype = read.info.dtype
        self.offset = read.info.offset
        self._descriptor, self._path, self._name = descriptor, path, read.info.name

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        wanted = count * self.dtype.size
        done = 0
        while done < wanted:
            place = self.offset + start * self.dtype.size + done
            try:
                got = read_at(self._descriptor, row[done:wanted].data, place)
            except OSError as error:
                raise CheckpointError(
                    f"cannot read tensor '{self._name}' from {self._path}: {error.strerror}"
                ) from None
            if got == 0:
                raise CheckpointError(f"{self._path} ends inside tensor '{self._name}'; it was cut while we read it")
            done += got


class _PickleReader:
    def __init__(self, path: Path, read: Read) -> None:
        from mergekit.checkpoint.pickles import PickledTensor

        self.dtype, self.offset = read.info.dtype, -1
        self._tensor = PickledTensor(path, read.info.name)

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        size = self.dtype.size
        self._tensor.read_into(row[: count * size], start * size)
