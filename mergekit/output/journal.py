"""The journal of a staging folder: which tensors are safely on disk, so that a killed run can continue.

The first line identifies the plan; each further line names a finished tensor and its checksum. Every line starts with
the CRC-32 of the rest, so that a line torn by a crash is known for what it is.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mergekit.checkpoint.positional import read_at
from mergekit.errors import ResumeError
from mergekit.planning.plan import OutputTensor, Plan

__all__ = ["Entry", "Journal", "publishing"]

_CHUNK = 1 << 22

Entry = tuple[OutputTensor, int, Mapping[str, Any] | None]
"""A finished tensor: its place, the checksum of its bytes, and its statistics."""


class Journal:
    """Append-only record of finished tensors of one plan."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self._path, self._identity = path, plan.identity()
        self._descriptor: int | None = None
        self.checksums: dict[str, int] = {}
        self.figures: dict[str, dict[str, Any]] = {}

    def open(self) -> bool:
        """Read what is there, or start anew (True). ResumeError if it belongs to other work, saying what changed."""
        records = _read(self._path)
        fresh = not records
        if records:
            theirs = records[0].get("plan")  # not is_same: what changed is to be named
            if not isinstance(theirs, dict) or theirs != self._identity:
                changed = [word for word, digest in self._identity.items() if (theirs or {}).get(word) != digest]
                raise ResumeError(
                    f"{self._path.parent} holds unfinished work of another merge: {' and '.join(changed)} changed; "
                    f"run the old command again to finish it, or pass --restart to throw it away"
                )
            self.checksums = {r["tensor"]: r["checksum"] for r in records[1:] if "tensor" in r}
            self.figures = {r["tensor"]: r["figures"] for r in records[1:] if r.get("figures")}
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o644)
        if fresh:
            self._write([{"plan": self._identity}])
        else:
            # A torn last line is cut off, so that the next one starts cleanly.
            os.ftruncate(self._descriptor, sum(len(_line(r)) for r in records))
            os.lseek(self._descriptor, 0, os.SEEK_END)
        return fresh

    def is_same(self) -> bool:
        """Whether the journal that is there is of this plan."""
        records = _read(self._path)
        return bool(records) and records[0].get("plan") == self._identity

    def verify(self, plan: Plan, files: Mapping[str, int]) -> frozenset[str]:
        """The names of the recorded tensors whose bytes are still what was written."""
        found = (output for output in plan.outputs if output.name in self.checksums)
        return frozenset(o.name for o in found if _checksum(files[o.file], o) == self.checksums[o.name])

    def append(self, batch: Sequence[Entry]) -> None:
        """Record tensors whose bytes have been brought to the disk."""
        if batch:
            self._write([{"tensor": o.name, "checksum": c, "figures": figures} for o, c, figures in batch])
            self.checksums.update((o.name, c) for o, c, _ in batch)
            self.figures.update((o.name, dict(figures)) for o, _, figures in batch if figures)

    def begin_publishing(self, last: str) -> None:
        """Record that files of the result are about to move to the output folder, ``last`` in the end."""
        self._write([{"publishing": last}])

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, records: Sequence[Mapping[str, object]]) -> None:
        assert self._descriptor is not None
        raw = b"".join(_line(record) for record in records)
        while raw:
            raw = raw[os.write(self._descriptor, raw) :]
        os.fsync(self._descriptor)


def publishing(path: Path) -> Literal["no", "begun", "done"]:
    """How far the run that wrote the journal at ``path`` came with publishing its result.

    It is done when the last file has moved from the staging folder to the output folder above it.
    """
    last = next((str(record["publishing"]) for record in _read(path) if "publishing" in record), None)
    if last is None:
        return "no"
    is_done = not (path.parent / last).exists() and (path.parents[1] / last).exists()
    return "done" if is_done else "begun"


def _line(record: Mapping[str, object]) -> bytes:
    text = json.dumps(record, ensure_ascii=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read(path: Path) -> list[dict[str, Any]]:
    """The records up to the first damaged line."""
    records = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    for line in lines[:-1]:
        code, _, text = line.partition(b" ")
        try:
            if int(code, 16) != zlib.crc32(text):
                break
            record = json.loads(text)
        except ValueError:
            break
        records.append(record)
    return records


def _checksum(descriptor: int, output: OutputTensor) -> int:
    from mergekit.kernels.checksum import checksum

    total = 0
    for start in range(0, output.nbytes, _CHUNK):
        block = np.zeros(min(_CHUNK, output.nbytes - start), np.uint8)
        done = 0
        while done < len(block) and (got := read_at(descriptor, block[done:].data, output.offset + start + done)):
            done += got
        total += checksum(block, start)
    return total & ((1 << 64) - 1)
