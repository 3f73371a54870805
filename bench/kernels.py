"""How fast each compiled kernel is: bytes read and written per second, against a plain copy of as many bytes.

    python bench/kernels.py            # prints a table and writes bench/results/kernels.md

One thread, bfloat16, three models, in blocks as the engine hands them out, over more memory than a processor's cache
holds. Every round times each kernel and the copy in turn; the table gives medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mergekit.dtypes import BF16, F32
from mergekit.kernels import cpu

MODELS, COUNT, BLOCKS = 3, 1 << 17, 64
"""Models, elements of a block, and blocks: 50 MB of inputs."""

Call = Callable[[np.ndarray, np.ndarray], object]
CODES = np.full(MODELS, cpu.CODES[BF16], np.int64)
OUT = cpu.CODES[BF16]
ONES, ZEROS = np.ones(MODELS, np.float32), np.zeros(MODELS, np.int64)
WANTED = np.array([False, *[True] * (MODELS - 1)])
WORDS, KEYS = np.zeros(MODELS, np.uint32), np.arange(2 * MODELS, dtype=np.uint32).reshape(MODELS, 2)
CHANCES = np.full(MODELS, 1 << 31, np.uint32)
TOP = np.float32(0.6).view(np.uint32)
VALUES = np.random.default_rng(1).standard_normal(COUNT).astype(np.float32)


def _rules(rule: int) -> np.ndarray:
    return np.full(MODELS, rule, np.int64)


def _sparse(rule: int, consensus: bool) -> Call:
    thresholds, quota = np.full(MODELS, TOP, np.uint32), np.full(MODELS, 1 << 40, np.int64)
    return lambda rows, out: cpu.sparse_sum(
        rows, CODES, 0, _rules(rule), thresholds, quota, CHANCES, KEYS, ONES, ONES, consensus, True, np.float32(1), 0,
        COUNT, out, OUT,
    )  # fmt: skip


def kernels() -> dict[str, tuple[Call, int]]:
    """Each kernel on one block, and the bytes that it reads and writes for each element."""
    gram, coarse = np.zeros((MODELS, MODELS)), np.zeros((MODELS, cpu.COARSE_BINS), np.int64)
    fine, bins = np.zeros((MODELS, cpu.FINE_BINS), np.uint32), np.full(MODELS, int(TOP) >> 16, np.int64)
    products = np.zeros((MODELS + 2, MODELS + 2))
    read, both = 2 * MODELS, 2 * MODELS + 2
    return {
        "weighted_sum": (lambda r, o: cpu.weighted_sum(r, CODES, ONES, COUNT, o, OUT), both),
        "weighted_delta_sum": (lambda r, o: cpu.weighted_delta_sum(r, CODES, ONES, 0, COUNT, o, OUT), both),
        "gram of weights": (lambda r, o: cpu.gram(r, CODES, -1, COUNT, gram), read),
        "gram of deltas": (lambda r, o: cpu.gram(r, CODES, 0, COUNT, gram), read),
        "coarse_histogram": (lambda r, o: cpu.coarse_histogram(r, CODES, 0, WANTED, COUNT, coarse), read),
        "fine_histogram": (lambda r, o: cpu.fine_histogram(r, CODES, 0, WANTED, bins, COUNT, fine), read),
        "sparse_sum, largest, consensus": (_sparse(cpu.KEEP_TOP, True), both),
        "sparse_sum, random": (_sparse(cpu.KEEP_RANDOM, False), both),
        "sparse_sum, random, consensus": (_sparse(cpu.KEEP_RANDOM, True), both),
        "statistics": (
            lambda r, o: cpu.statistics(r, CODES, 0, VALUES, o, OUT, COUNT, products, np.zeros(2, np.int64)),
            both + F32.size,
        ),
        "store": (lambda r, o: cpu.store(VALUES, COUNT, o, OUT), 2 + F32.size),
        "round_stochastically": (lambda r, o: cpu.round_stochastically(VALUES, COUNT, o, OUT, 0, 1, 2), 2 + F32.size),
        "checksum": (lambda r, o: cpu.checksum(o, 0), 2),
        "all_finite": (lambda r, o: cpu.all_finite(o, OUT, COUNT), 2),
    }  # fmt: skip


def main() -> None:
    """Time every kernel in turn, several rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    random = np.random.default_rng(0)
    # Upper halves of float32 numbers are bfloat16 numbers.
    halves = random.standard_normal((MODELS, COUNT)).astype(np.float32).view(np.uint16)[:, 1::2]
    blocks = [np.ascontiguousarray(np.roll(halves, b, axis=1)).view(np.uint8) for b in range(BLOCKS)]
    outs = [np.zeros(2 * COUNT, np.uint8) for _ in range(BLOCKS)]
    copies = [np.empty_like(block) for block in blocks]
    table = kernels()
    speeds: dict[str, list[float]] = {name: [] for name in ("copy", *table)}
    for number in range(rounds + 1):  # the first round compiles
        started = time.perf_counter()
        for block, copy in zip(blocks, copies, strict=True):
            np.copyto(copy, block)
        speeds["copy"].append(2 * BLOCKS * blocks[0].nbytes / (time.perf_counter() - started))
        for name, (call, nbytes) in table.items():
            started = time.perf_counter()
            for block, out in zip(blocks, outs, strict=True):
                call(block, out)
            speeds[name].append(nbytes * BLOCKS * COUNT / (time.perf_counter() - started))
        if number == 0:
            speeds = {name: [] for name in speeds}
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    lines = [
        "# Kernel speed",
        "",
        f"One thread, bfloat16, {MODELS} models, blocks of {COUNT:,} elements, {platform.machine()}, {os.cpu_count()} "
        f"processors; medians of {rounds} rounds. Bytes are those read and written; a copy reads and writes each once.",
        "",
        "| kernel | GB/s | of a copy |",
        "|---|---|---|",
        *(f"| {name} | {speed / 1e9:.2f} | {speed / medians['copy']:.2f} |" for name, speed in medians.items()),
    ]
    print("\n".join(lines))
    (Path(__file__).parent / "results" / "kernels.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
