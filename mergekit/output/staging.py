"""The staging folder: preallocated shards inside the output folder, written at final offsets, published at the end.

Nothing in the output folder looks like a model until everything is there: shards are renamed into place first, then
the index, then the small files, and config.json last.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergekit.checkpoint.positional import write_at
from mergekit.errors import (
    CheckpointError,
    DiskSpaceError,
    InputChangedError,
    NonFiniteError,
    RunError,
    UsageError,
)
from mergekit.output.journal import Entry, Journal, publishing
from mergekit.output.manifest import MANIFEST, read_manifest, sha256
from mergekit.output.names import REPORT, ROUTING
from mergekit.output.stats import STATS
from mergekit.planning.plan import OutputTensor, Plan

__all__ = ["STAGING", "Staging", "holds_weights", "is_model_file", "refuse_replacing"]

STAGING = ".mergekit-staging"
_MODEL_FILE = re.compile(r"^(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?$")
_OURS = (STATS, MANIFEST, ROUTING, REPORT, "configuration_phi3_moe.py", "modeling_phi3_moe.py")
"""Files that would say something false beside another model."""
_COMMIT_BYTES = 1 << 30
_COMMIT_SECONDS = 5.0


class Staging:
    """The work in progress inside an output folder: a ``Sink`` for the executor, and a context manager.

    Leaving the context without ``publish`` keeps the finished tensors for the next run of the same plan, unless that
    run would meet the same fault again.
    """

    def __init__(self, out: Path, plan: Plan, *, overwrite: bool = False, restart: bool = False) -> None:
        self.out, self.folder, self._plan = out, out / STAGING, plan
        self._overwrite, self._restart = overwrite, restart
        self._files: dict[str, int] = {}
        self._lock_file: int | None = None
        self._lock = threading.Lock()
        self._finished: list[Entry] = []
        self._uncommitted = 0
        self._last_commit = time.monotonic()
        self._wake = threading.Condition(self._lock)
        self._closing = False
        self._committer: threading.Thread | None = None
        self._fault: BaseException | None = None
        self.notes: list[str] = []
        self.done: frozenset[str] = frozenset()
        self.is_complete = False
        """The result was published by an earlier run: there is nothing to do."""

    def __enter__(self) -> Staging:
        """Lock the folder, create or reopen the shards."""
        self._is_new = not self.out.exists()
        _make_folder(self.out)
        self._take_lock()
        try:
            if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
                raise UsageError(f"{self.folder} is not a folder of ours; remove it")
            self.journal = Journal(self.folder / "journal", self._plan)
            if publishing(self.folder / "journal") == "done":
                # Killed while it cleaned up: nothing is left to do for the same plan, and others meet a finished model.
                self.is_complete = not self._restart and self.journal.is_same()
                self._clear()
                if self.is_complete:
                    return self
                refuse_replacing(self.out, overwrite=self._overwrite)
            if self._restart and self.folder.exists():
                shutil.rmtree(self.folder)
            _make_folder(self.folder)
            fresh = self.journal.open()
            for shard in self._plan.shards:
                self._open_shard(shard.name, shard.size, shard.header, fresh)
            self.done = self.journal.verify(self._plan, self._files)
            self._committer = threading.Thread(target=self._commit_loop, name="committer", daemon=True)
            self._committer.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Commit what is finished and close everything; the staging folder stays if another run can use it."""
        self._stop_committer()
        try:
            if kind is not None and issubclass(kind, UsageError | NonFiniteError | InputChangedError):
                self._discard()
            elif kind is not None and self.folder.exists():
                self._commit()
        except OSError:
            pass  # the run has failed already; what can't be committed is computed again
        finally:
            self._close()

    def _discard(self) -> None:
        """Leave nothing behind: the same command would fail in the same way."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._is_new and not any(self.out.iterdir()):
            self.out.rmdir()

    @property
    def figures(self) -> Mapping[str, Mapping[str, Any]]:
        """The statistics of the tensors by name, after ``settle``."""
        return self.journal.figures

    @property
    def checksums(self) -> Mapping[str, int]:
        """The checksums of the tensors by name, after ``settle``."""
        return self.journal.checksums

    def remaining(self) -> list[OutputTensor]:
        """The tensors that no earlier run has finished."""
        return [output for output in self._plan.outputs if output.name not in self.done]

    # The sink

    def write(self, output: OutputTensor, start: int, data: np.ndarray) -> None:
        """Write ``data`` (uint8) at byte ``start`` of a tensor."""
        descriptor, place, view = self._files[output.file], output.offset + start, data.data
        try:
            while view:
                written = write_at(descriptor, view, place)
                view, place = view[written:], place + written
        except OSError as error:
            raise _write_fault(error, self.out) from None

    def finish(self, output: OutputTensor, checksum: int, figures: Mapping[str, Any] | None) -> None:
        """Queue a finished tensor for the journal."""
        with self._wake:
            if self._fault is not None:
                raise self._fault
            self._finished.append((output, checksum, figures))
            self._uncommitted += output.nbytes
            if self._uncommitted >= _COMMIT_BYTES:
                self._wake.notify()

    def note(self, tensor: str, text: str) -> None:
        """Keep a remark for the end of the run."""
        with self._lock:
            self.notes.append(f"{tensor} {text}")

    # Commits

    def _commit_loop(self) -> None:
        while True:
            with self._wake:
                due = self._last_commit + _COMMIT_SECONDS - time.monotonic()
                if not self._closing and self._uncommitted < _COMMIT_BYTES and due > 0:
                    self._wake.wait(due)
                if self._closing:
                    return
                ready = self._uncommitted >= _COMMIT_BYTES or time.monotonic() - self._last_commit >= _COMMIT_SECONDS
            if ready:
                try:
                    self._commit()
                except BaseException as error:  # raised again by the next write or by publish
                    with self._wake:
                        self._fault = _write_fault(error, self.out) if isinstance(error, OSError) else error
                    return

    def _commit(self) -> None:
        """Bring the shards to the disk, then say in the journal which tensors are there."""
        with self._lock:
            batch, self._finished, self._uncommitted = self._finished, [], 0
        for file in dict.fromkeys(output.file for output, _, _ in batch):
            os.fsync(self._files[file])
        self.journal.append(batch)
        self._last_commit = time.monotonic()

    def settle(self) -> None:
        """Bring every tensor to the disk and into the journal: nothing more will be written."""
        self._stop_committer()
        if self._fault is not None:
            raise self._fault
        try:
            for descriptor in self._files.values():
                os.fsync(descriptor)
            self._commit()
        except OSError as error:
            raise _write_fault(error, self.out) from None

    def _stop_committer(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._committer is not None:
            self._committer.join()

    # Publishing

    def publish(self, documents: Sequence[tuple[str, str | Path]]) -> None:
        """Make the result visible: shards, then the small ``documents`` in the given order; then remove the staging.

        Comes after ``settle``. Each document is (name, text) or (name, path of a file to copy). Whatever is last
        (config.json) makes the folder a model. Files of a model that stood here before are removed first, its
        config.json before all others; of its small files those that its manifest lists and nobody changed.
        """
        try:
            self._close_files()
            for name, content in documents:
                _write_document(self.folder / name, content)
            replaced = [name for name, _ in documents if (self.out / name).exists()]
            if replaced and not self._overwrite:
                self.notes.append(f"replaced what {self.out} held as {', '.join(replaced)}")
            # From here on the folder may hold parts of this result: the next run may replace them unasked.
            self.journal.begin_publishing(documents[-1][0] if documents else self._plan.shards[-1].name)
            _remove_old_model(self.out)
            for shard in self._plan.shards:
                os.replace(self.folder / shard.name, self.out / shard.name)
            for name, _ in documents:
                if name == documents[-1][0]:
                    _sync_folder(self.out)  # what makes the folder a model comes after all else, power cuts included
                os.replace(self.folder / name, self.out / name)
            _sync_folder(self.out)
        except OSError as error:
            raise _write_fault(error, self.out) from None
        self.journal.close()
        self._clear()
        if self.folder.exists():
            self.notes.append(f"{self.folder} could not be removed; the model is complete, remove it by hand")

    def _clear(self) -> None:
        """Remove the staging folder, the journal last: it tells that the rest is of no use."""
        for path in self.folder.iterdir():
            if path.name == "journal":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    # Files

    def _open_shard(self, name: str, size: int, header: bytes, fresh: bool) -> None:
        path = self.folder / name
        try:
            descriptor = os.open(
                path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0), 0o644
            )
            self._files[name] = descriptor
            if fresh or os.fstat(descriptor).st_size != size:
                os.ftruncate(descriptor, 0)
                self.notes += _allocate(descriptor, size)
            write_at(descriptor, memoryview(header), 0)
        except OSError as error:
            raise _write_fault(error, self.out) from None

    def _take_lock(self) -> None:
        """Lock the output folder itself: the lock dies with this process and leaves no file behind."""
        try:
            import fcntl
        except ImportError:  # not on this system: go on without
            return
        self._lock_file = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_file)
            self._lock_file = None
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UsageError(
                    f"another merge is writing to {self.out}; wait for it, or choose another folder"
                ) from None
            self.notes.append(f"{self.out} can't be locked on this file system; don't run two merges into it")

    def _close_files(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _close(self) -> None:
        self._close_files()
        if hasattr(self, "journal"):
            self.journal.close()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None


def _allocate(descriptor: int, size: int) -> list[str]:
    """Reserve the blocks of a file, which makes writing it several times faster; a note where that can't be done."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(descriptor, size)
        return ["this file system can't reserve space ahead; writing is slower"]
    return []


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path}: {error.strerror}") from None


def _write_document(path: Path, content: str | Path) -> None:
    with path.open("wb") as stream:
        if isinstance(content, Path):
            with content.open("rb") as source:
                shutil.copyfileobj(source, stream)
        else:
            stream.write(content.encode("utf-8"))
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # folders can't be opened everywhere; the renames are then as safe as the file system makes them
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def holds_weights(folder: Path) -> list[str]:
    """The files of ``folder`` that loaders would take for a model's weights, or for an index of them."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_file() and is_model_file(p.name))


def is_model_file(name: str) -> bool:
    """Whether loaders would take a file of this name for a model's weights, or for an index of them."""
    return bool(_MODEL_FILE.match(name))


def refuse_replacing(folder: Path, *, overwrite: bool) -> None:
    """UsageError if ``folder`` holds weights that may not be replaced."""
    present = holds_weights(folder)
    if present and not overwrite:
        raise UsageError(f"{folder} already holds weights ({present[0]}); choose another folder, or pass --overwrite")


def _remove_old_model(folder: Path) -> None:
    (folder / "config.json").unlink(missing_ok=True)
    for name in [*_small_files(folder), *_OURS]:  # in this order: the manifest knows the others
        (folder / name).unlink(missing_ok=True)
    for name in sorted(holds_weights(folder), key=lambda n: not n.endswith(".index.json")):
        (folder / name).unlink(missing_ok=True)


def _small_files(folder: Path) -> list[str]:
    """What an earlier merge wrote into ``folder`` beside the weights and nobody changed: a tokenizer, say."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        manifest = None
    if manifest is None:
        return []
    return [
        name for name, digest in manifest.files.items() if (folder / name).is_file() and sha256(folder / name) == digest
    ]


def _write_fault(error: OSError, folder: Path) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(f"no space left for {folder}; free some and run the same command again: it continues")
    return RunError(f"cannot write to {folder}: {error.strerror or error}")
