"""Run the real command slowly, say at which stage it is, and let its disk fail if asked: for ``kill_matrix.py``.

    python bench/reliability/slow_run.py '{"log": "log", "pace": 0.01}' merge recipe.yml out

The product has no hook for this. Before it calls the command's main function, this script patches: ``Staging.write``
(pieces of a tensor, a sleep after each), the journal's ``write`` (a few bytes at a time, so that lines are torn),
``os.replace``, ``os.unlink`` and ``os.fsync`` (a sleep before each), and the seconds between two commits. What is
written, and in which order, stays the same. With ``pace`` 0 nothing sleeps and only the log is kept.

A line of the log is ``stage NAME SECONDS``, ``kept TENSOR`` (not computed again), ``computed TENSOR`` or, at the end,
``moved READ WRITTEN`` (bytes). A ``fault`` is ``[kind, number]``: ``eio`` and ``full`` fail after that many bytes have
been read or written at positions, ``document`` and ``journal`` find the disk full in the middle of that small file or
journal write, ``limit`` is RLIMIT_FSIZE.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from mergekit.cli.main import main  # noqa: E402
from mergekit.output import journal, staging  # noqa: E402

_COMMIT_SECONDS = 0.06
_PIECE = 1 << 16
"""Bytes written between two sleeps."""
_TORN = 150
"""Most bytes of a journal line written at once."""


class Log:
    """The stages of a run, in a file that outlives it."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.stage = ""

    def say(self, text: str) -> None:
        """One line, in one write."""
        _write(self._file, f"{text}\n".encode())

    def enter(self, stage: str) -> None:
        """A new stage begins."""
        if stage != self.stage:
            self.stage = stage
            self.say(f"stage {stage} {time.monotonic():.6f}")


class Disk:
    """Counts what is read and written at positions, and fails where it is told to."""

    def __init__(self, fault: list[Any] | None) -> None:
        self.kind: str = fault[0] if fault else ""
        self.number: int = fault[1] if fault else 0
        self.read = self.written = self.small = 0
        self._lock = threading.Lock()

    def preadv(self, descriptor: int, buffers: list[memoryview], place: int) -> int:
        """``os.preadv``."""
        got = _preadv(descriptor, buffers, place)
        with self._lock:
            self.read += got
            if self.kind == "eio" and self.read > self.number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return got

    def pwrite(self, descriptor: int, data: memoryview, place: int) -> int:
        """``os.pwrite``; where the disk fills up, the part that still fits is written."""
        with self._lock:
            if self.kind == "full":
                data = data[: max(0, self.number - self.written)]
                if not data:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.written += len(data)
        return _pwrite(descriptor, data, place)

    def fills_up(self, kind: str) -> bool:
        """Whether the disk is full at this small write of ``kind``."""
        if self.kind != kind:
            return False
        self.small += 1
        return self.small > self.number


class TornWrites:
    """The module ``os`` for the journal: few bytes at a time."""

    def __init__(self, disk: Disk, pace: float) -> None:
        self._disk, self._pace = disk, pace

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        """Part of a line."""
        full = self._disk.fills_up("journal")
        done = _write(descriptor, data[: random.randint(1, _TORN)] if self._pace or full else data)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(self._pace / 10)
        return done


_write, _preadv, _pwrite = os.write, os.preadv, os.pwrite


def patch(log: Log, pace: float, disk: Disk) -> None:
    """Put the sleeps and the log into mergekit."""
    staging._COMMIT_SECONDS = _COMMIT_SECONDS
    os.preadv, os.pwrite = disk.preadv, disk.pwrite  # type: ignore[assignment]
    vars(journal)["os"] = TornWrites(disk, pace)
    for name in ("replace", "unlink", "fsync"):
        setattr(os, name, _after_sleep(getattr(os, name), pace))
    _patch_staging(log, pace)
    write_document = staging._write_document

    def document(path: Path, content: str | Path) -> None:
        write_document(path, content)
        if disk.fills_up("document"):
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(pace / 2)

    staging._write_document = document


def _after_sleep(call: Callable[..., Any], pace: float) -> Callable[..., Any]:
    def slow(*args: Any, **more: Any) -> Any:
        time.sleep(pace)
        return call(*args, **more)

    return slow


def _patch_staging(log: Log, pace: float) -> None:
    kind = staging.Staging
    enter, write, finish, commit, settle = kind.__enter__, kind.write, kind.finish, kind._commit, kind.settle
    publish, begin, clear = kind.publish, journal.Journal.begin_publishing, kind._clear

    def entered(self: Any) -> Any:
        log.enter("opening")
        result = enter(self)
        for name in self.done:
            log.say(f"kept {name}")
        log.enter("preparing")
        return result

    def written(self: Any, output: Any, start: int, data: Any) -> None:
        if log.stage != "committing":
            log.enter("writing")
        piece = _PIECE if pace else max(1, len(data))
        for first in range(0, len(data), piece):
            write(self, output, start + first, data[first : first + piece])
            time.sleep(pace)

    def finished(self: Any, output: Any, checksum: int, figures: Any) -> None:
        finish(self, output, checksum, figures)
        log.say(f"computed {output.name}")

    def committed(self: Any) -> None:
        before = log.stage
        if self._finished and before in ("preparing", "writing"):
            log.enter("committing")
            time.sleep(pace)
        commit(self)
        if log.stage == "committing":
            log.enter("writing")

    def settled(self: Any) -> None:
        settle(self)
        log.enter("finishing")

    def began(self: Any, last: str) -> None:
        log.enter("publishing")
        begin(self, last)

    def cleared(self: Any) -> None:
        if log.stage == "publishing":
            log.enter("cleaning")
        clear(self)

    def published(self: Any, documents: Any) -> None:
        publish(self, documents)
        log.enter("after")
        time.sleep(pace * 8)

    for name, call in {
        "__enter__": entered, "write": written, "finish": finished, "_commit": committed, "settle": settled,
        "publish": published, "_clear": cleared,
    }.items():  # fmt: skip
        setattr(kind, name, call)
    journal.Journal.begin_publishing = began  # type: ignore[method-assign]


def run() -> None:
    """Patch, then be the command."""
    settings = json.loads(sys.argv[1])
    log, disk = Log(settings["log"]), Disk(settings.get("fault"))
    patch(log, settings["pace"], disk)
    if disk.kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk.number, disk.number))
    log.enter("planning")
    sys.argv[:] = ["mergekit", *sys.argv[2:]]
    try:
        main()
    finally:
        log.say(f"moved {disk.read} {disk.written}")


if __name__ == "__main__":
    run()
