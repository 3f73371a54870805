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
from mergekit.kernels import cpu, fused
from mergekit.methods import Elementwise, get_method

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


THRESHOLDS = np.full((2, MODELS), TOP, np.uint32)
THRESHOLDS[1] = np.float32(2.5).view(np.uint32)  # what is cut off above, by MagnitudeBand
ROW = 2048
"""Elements of a row, for the kernels that rank the entries of each."""


def _sparse(rule: int, elect: int) -> Call:
    rules, quota = np.full(MODELS, rule, np.int64), np.full((2, MODELS), 1 << 40, np.int64)
    gains = np.ones((MODELS, COUNT), np.float32)
    return lambda rows, out: cpu.sparse_sum(
        rows, CODES, 0, rules, THRESHOLDS, quota, CHANCES, KEYS, gains, ONES, ONES, elect, True, np.float32(1), 0,
        COUNT, out, OUT,
    )  # fmt: skip


def _load(rows: np.ndarray, chunk: np.ndarray) -> None:
    for start in range(0, COUNT, cpu.CHUNK):
        cpu.load_chunk(rows, CODES, 0, start, cpu.CHUNK, chunk)


def _call(made: fused.Fused) -> tuple[int, np.ndarray]:
    return made.address, made.scalars


def kernels() -> dict[str, tuple[Call, int]]:
    """Each kernel on one block, and the bytes that it reads and writes for each element."""
    gram, coarse = np.zeros((MODELS, MODELS)), np.zeros((MODELS, cpu.COARSE_BINS), np.int64)
    fine, bins = np.zeros((MODELS, cpu.FINE_BINS), np.uint32), np.full(MODELS, int(TOP) >> 16, np.int64)
    rules, quota = np.full(MODELS, cpu.KEEP_RANDOM, np.int64), np.zeros((2, MODELS), np.int64)
    products, norms = np.zeros((MODELS + 2, MODELS + 2)), np.zeros((MODELS, 3))
    gains, scratch = np.zeros((MODELS, COUNT), np.float32), np.empty((2, ROW), np.uint64)
    lows, spans = np.full(MODELS, 1 << 30, np.int64), np.full(MODELS, 1 << 31, np.int64)
    picks = np.full(MODELS, 64, np.int64)
    by_row, by_column = np.zeros((COUNT // ROW, MODELS, MODELS)), np.zeros((MODELS, MODELS, ROW))
    table, chunk = np.ones((MODELS, ROW), np.float32), np.empty((MODELS, cpu.CHUNK), np.float32)
    tables, lower = np.zeros((4, cpu.COARSE_BINS), np.int64), np.zeros(cpu.FINE_BINS, np.uint32)
    keys = np.abs(VALUES)
    sce, deltas, topk = get_method("sce"), MODELS - 1, {"select_topk": 0.5}
    assert isinstance(sce.form, Elementwise)
    assert sce.form.key
    assert sce.form.measure
    key = fused.fuse(sce.form.key, deltas, (), topk)
    terms = fused.fuse(sce.form.measure, deltas, (), topk, sums=True)
    function = fused.fuse(sce.function, deltas, (np.ones(deltas),), topk)
    read, both, single = 2 * MODELS, 2 * MODELS + 2, F32.size
    return {
        "weighted_sum": (lambda r, o: cpu.weighted_sum(r, CODES, ONES, COUNT, o, OUT), both),
        "weighted_delta_sum": (lambda r, o: cpu.weighted_delta_sum(r, CODES, ONES, 0, COUNT, o, OUT), both),
        "gram of weights": (lambda r, o: cpu.gram(r, CODES, -1, COUNT, gram), read),
        "gram of deltas": (lambda r, o: cpu.gram(r, CODES, 0, COUNT, gram), read),
        "row_grams": (lambda r, o: cpu.row_grams(r, CODES, 0, ROW, 0, 0, COUNT, by_row), read),
        "column_grams": (lambda r, o: cpu.column_grams(r, CODES, 0, ROW, 0, COUNT, by_column), read),
        "weighted_vectors, columns": (lambda r, o: cpu.weighted_vectors(r, CODES, table, 0, 1, 0, COUNT, o, OUT), both),
        "coarse_histogram": (lambda r, o: cpu.coarse_histogram(r, CODES, 0, WANTED, COUNT, coarse), read),
        "fine_histogram": (lambda r, o: cpu.fine_histogram(r, CODES, 0, WANTED, bins, COUNT, fine), read),
        "kept_norms, random": (
            lambda r, o: cpu.kept_norms(
                r, CODES, 0, WANTED, rules, THRESHOLDS, quota, CHANCES, KEYS, gains, COUNT, 0, COUNT, norms), read),
        "rank_gains": (
            lambda r, o: cpu.rank_gains(
                r, CODES, 0, WANTED, lows, spans, KEYS, ROW, False, 0, COUNT, scratch, gains), read + single * MODELS),
        "group_gains": (
            lambda r, o: cpu.group_gains(r, CODES, 0, WANTED, picks, 256, COUNT, gains), read + single * MODELS),
        "sparse_sum, largest, consensus": (_sparse(cpu.KEEP_TOP, cpu.ELECT_WEIGHTED), both),
        "sparse_sum, band": (_sparse(cpu.KEEP_BAND, cpu.ELECT_NONE), both),
        "sparse_sum, random": (_sparse(cpu.KEEP_RANDOM, cpu.ELECT_NONE), both),
        "sparse_sum, random, consensus": (_sparse(cpu.KEEP_RANDOM, cpu.ELECT_WEIGHTED), both),
        "sparse_sum, given": (_sparse(cpu.KEEP_GIVEN, cpu.ELECT_NONE), both + single * MODELS),
        "load_chunk": (lambda r, o: _load(r, chunk), read + single * MODELS),
        "count_upper": (lambda r, o: cpu.count_upper(keys, tables), single),
        "count_lower": (lambda r, o: cpu.count_lower(keys, int(TOP) >> 16, lower), single),
        "keep_largest": (lambda r, o: cpu.keep_largest((VALUES,), keys, int(TOP), 1 << 40), 3 * single),
        "upper_pass of sce": (lambda r, o: fused.upper_pass(r, CODES, 0, COUNT, *_call(key), tables), read),
        "lower_pass of sce": (
            lambda r, o: fused.lower_pass(r, CODES, 0, COUNT, *_call(key), int(TOP) >> 16, lower),
            read,
        ),
        "sums_pass of sce": (
            lambda r, o: fused.sums_pass(
                r, CODES, 0, COUNT, *_call(terms), *_call(key), int(TOP), 1 << 40, np.zeros(MODELS - 1)
            ),
            read,
        ),
        "merge_pass of sce": (
            lambda r, o: fused.merge_pass(
                r, CODES, 0, COUNT, *_call(function), *_call(key), int(TOP), 1 << 40, np.float32(1), o, OUT
            ),
            both,
        ),
        "statistics": (
            lambda r, o: cpu.statistics(r, CODES, 0, VALUES, o, OUT, COUNT, products, np.zeros(2, np.int64)),
            both + single,
        ),
        "store": (lambda r, o: cpu.store(VALUES, COUNT, o, OUT), 2 + single),
        "round_stochastically": (lambda r, o: cpu.round_stochastically(VALUES, COUNT, o, OUT, 0, 1, 2), 2 + single),
        "count_nonfinite": (lambda r, o: cpu.count_nonfinite(o, OUT, COUNT), 2),
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
