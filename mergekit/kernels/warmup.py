"""Compile kernels ahead of their use, by calling each on a few numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numba
import numpy as np

from mergekit.kernels import cpu, four_bit, fused, lora

__all__ = ["FORMS", "cold_forms", "warm_up"]

FORMS = ("span", "vectors", "sparse", "elementwise", "adapters", "differences")
"""The families of kernels that are compiled together."""


def _marker(form: str) -> Path:
    """The file that says so. Kernels are compiled for each place of this package apart, as numba caches by path."""
    place = blake2b(os.path.realpath(__file__).encode(errors="surrogateescape"), digest_size=6).hexdigest()
    return Path(numba.config.CACHE_DIR) / f"{form}-{place}.compiled"


def cold_forms(forms: Iterable[str] = FORMS) -> list[str]:
    """Those of ``forms`` that have not been compiled on this machine yet."""
    return [form for form in forms if not _marker(form).exists()]


def warm_up(forms: Iterable[str] = FORMS) -> None:
    """Compile the kernels of ``forms`` (a few seconds each on a fresh machine, nothing afterwards)."""
    count = 2048
    rows = np.zeros((2, count * 4), np.uint8)
    codes = np.full(2, cpu.CODES[next(iter(cpu.CODES))], np.int64)
    out, ones = np.empty(count * 2, np.uint8), np.ones(2, np.float32)
    for form in forms:
        cpu.checksum(out, 0)
        cpu.all_finite(rows[0], 0, count)
        values = np.zeros(count, np.float32)
        cpu.store(values, count, out, 0)
        cpu.round_stochastically(values, count, out, 0, 0, 0, 0)
        cpu.count_nonfinite(out, 0, count)
        cpu.statistics(rows, codes, 0, values, out, 0, count, np.zeros((4, 4)), np.zeros(2, np.int64))
        if form == "span":
            cpu.weighted_sum(rows, codes, ones, count, out, 0)
            cpu.weighted_delta_sum(rows, codes, ones, 0, count, out, 0)
            cpu.gram(rows, codes, -1, count, np.zeros((2, 2)))
        elif form == "differences":
            cpu.differences(rows, codes, count, np.zeros((2, 2)), np.zeros((2, 2), np.int64))
        elif form == "vectors":
            cpu.row_grams(rows, codes, -1, count, 0, 0, count, np.zeros((1, 2, 2)))
            cpu.column_grams(rows, codes, -1, 1, 0, count, np.zeros((2, 2, 1)))
            cpu.weighted_vectors(rows, codes, np.zeros((2, 1), np.float32), -1, 1, 0, count, out, 0)
        elif form == "elementwise":
            cpu.load_chunk(rows, codes, 0, 0, count, np.empty((2, cpu.CHUNK), np.float32))
            cpu.count_upper(values, np.zeros((4, cpu.COARSE_BINS), np.int64))
            cpu.count_lower(values, 0, np.zeros(cpu.FINE_BINS, np.uint32))
            cpu.keep_largest((values,), values, 0, 0)
            first = cpu.fuse(lambda xp, x: x[0] * 1.0, 1)
            call = (rows, codes, 0, count, first.address, first.scalars)
            fused.upper_pass(*call, np.zeros((4, cpu.COARSE_BINS), np.int64))
            fused.lower_pass(*call, 0, np.zeros(cpu.FINE_BINS, np.uint32))
            fused.sums_pass(*call, first.address, first.scalars, 0, 0, np.zeros(1))
            fused.merge_pass(*call, first.address, first.scalars, 0, 0, np.float32(1), out, 0)
        elif form == "adapters":
            values, scales = np.zeros(128, np.float32), np.ones(2, np.float32)
            lora.add_product(values, 0, 64, np.zeros((2, 1), np.float32), np.zeros((1, 64), np.float32), ones[0])
            lora.multiply(values, 0, 64, True, scales)
            lora.add_squares(values, 0, 64, True, np.zeros(2))
            table, bounds = four_bit.levels("nf4")
            four_bit.largest(values, 64, scales)
            four_bit.requantize(values, 64, table, bounds, scales, 0)
            four_bit.unpack(rows[0], 0, 64, table, scales, 0, values)
        else:
            flags, bins = np.ones(2, np.bool_), np.zeros(2, np.int64)
            rules, quota, limits = np.zeros(2, np.int64), np.zeros((2, 2), np.int64), np.zeros((2, 2), np.uint32)
            chances, keys = np.zeros(2, np.uint32), np.zeros((2, 2), np.uint32)
            gains, row = np.zeros((2, count), np.float32), count // 2
            cpu.coarse_histogram(rows, codes, 0, flags, count, np.zeros((2, cpu.COARSE_BINS), np.int64))
            cpu.fine_histogram(rows, codes, 0, flags, bins, count, np.zeros((2, cpu.FINE_BINS), np.uint32))
            cpu.rank_gains(rows, codes, 0, flags, bins, bins + 1, keys, row, False, 0, count,
                           np.zeros((2, row), np.uint64), gains)  # fmt: skip
            cpu.group_gains(rows, codes, 0, flags, bins, 256, count, gains)
            cpu.kept_norms(rows, codes, 0, flags, rules, limits, quota, chances, keys, gains, count, 0, count,
                           np.zeros((2, 3)))  # fmt: skip
            cpu.sparse_sum(rows, codes, 0, rules, limits, quota, chances, keys, gains, ones, ones, cpu.ELECT_WEIGHTED,
                           True, np.float32(1), 0, count, out, 0)  # fmt: skip
        try:
            _marker(form).touch()
        except OSError:
            pass  # the next run compiles again, and says so again
