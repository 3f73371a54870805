"""Downloads of several files: side by side, watched, and given up at once at an interrupt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["Told", "arriving", "side_by_side"]

Told = Callable[[str, int, int], None]
"""Hears four times a second of a download that takes long: the model, bytes that are here, bytes in all."""

_WATCH = 0.25  # seconds between two looks


def side_by_side(call: Callable[[str], str], names: Sequence[str], watch: Callable[[Sequence[str]], None]) -> list[str]:
    """``call`` of each name, four at a time; ``watch`` hears now and then which are finished.

    A fault waits for what is on its way, and begins nothing new; an interrupt does not wait: the threads are daemons.
    """
    results: dict[str, str] = {}
    faults: list[BaseException] = []
    waiting, lock = iter(names), threading.Lock()

    def work() -> None:
        while not faults:
            with lock:
                name = next(waiting, None)
            if name is None:
                return
            try:
                results[name] = call(name)
            except Exception as error:  # raised below
                faults.append(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(4, len(names)))]
    for worker in workers:
        worker.start()
    try:
        while running := [worker for worker in workers if worker.is_alive()]:
            running[0].join(_WATCH)
            if running[0].is_alive():
                watch(list(results))
    except BaseException as error:
        faults.append(error)
        raise
    if faults:
        raise faults[0]
    return [results[name] for name in names]


def arriving(repo_id: str, cache_dir: Path | None) -> Callable[[], int]:
    """Counts the bytes that the cache holds, from now on, of files of a repository that are not whole yet."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    blobs = cache / repo_folder_name(repo_id=repo_id, repo_type="model") / "blobs"
    since = time.time()

    def count() -> int:
        nbytes = 0
        for path in blobs.glob("*.incomplete"):
            with suppress(OSError):  # it may be whole meanwhile
                status = path.stat()
                nbytes += status.st_size if status.st_mtime >= since else 0
        return nbytes

    return count
