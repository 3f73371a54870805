"""The floor: import what a merge imports, then only move the bytes. Two threads read the inputs and write a file.

python bench/floor.py OUT BYTES INPUT[:BYTES] [INPUT[:BYTES] ...]

Of an input with ``:BYTES`` only so many bytes are read, spread over the file.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading

import mergekit.api
import mergekit.cli.merge
import mergekit.execute
import mergekit.kernels.cpu
import mergekit.output
import mergekit.planning.build  # noqa: F401  (imported because a merge imports it)

CHUNK = 1 << 19


def main(out: str, size: int, inputs: list[str], threads: int = 2) -> None:
    """Read the inputs, write ``size`` bytes to a preallocated file, fsync."""
    parts = [text.partition(":")[::2] for text in inputs]
    files = [os.open(path, os.O_RDONLY) for path, _ in parts]
    shares = [int(most or os.fstat(f).st_size) / os.fstat(f).st_size for f, (_, most) in zip(files, parts, strict=True)]
    target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(target, 0, size)

    def work(number: int) -> None:
        # Half a page away from the places in the files: some processors copy slowly when these nearly coincide.
        view = memoryview(mmap.mmap(-1, CHUNK + 4096))[2048 : 2048 + CHUNK]
        longest = max(size, *(os.fstat(f).st_size for f in files))
        for place in range(number * CHUNK, longest, threads * CHUNK):
            for file, share in zip(files, shares, strict=True):
                if int((place // CHUNK + 1) * share) > int(place // CHUNK * share):
                    os.preadv(file, [view], place)
            if place < size:
                os.pwrite(target, view[: min(CHUNK, size - place)], place)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.fsync(target)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
