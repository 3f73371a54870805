"""The CPU back end: every kernel that the executor calls, under one name. ``accelerator`` offers the same names."""

from mergekit.kernels.checksum import checksum
from mergekit.kernels.codec import CODES, all_finite
from mergekit.kernels.rounding import count_nonfinite, round_stochastically, store
from mergekit.kernels.span import gram, weighted_delta_sum, weighted_sum
from mergekit.kernels.sparse import (
    COARSE_BINS,
    FINE_BINS,
    KEEP_ALL,
    KEEP_NONE,
    KEEP_RANDOM,
    KEEP_TOP,
    coarse_histogram,
    fine_histogram,
    kept_norms,
    sparse_sum,
)
from mergekit.kernels.statistics import statistics

__all__ = [
    "COARSE_BINS",
    "CODES",
    "FINE_BINS",
    "KEEP_ALL",
    "KEEP_NONE",
    "KEEP_RANDOM",
    "KEEP_TOP",
    "all_finite",
    "checksum",
    "coarse_histogram",
    "count_nonfinite",
    "fine_histogram",
    "gram",
    "kept_norms",
    "round_stochastically",
    "sparse_sum",
    "statistics",
    "store",
    "weighted_delta_sum",
    "weighted_sum",
]
