"""The CPU back end: every kernel that the executor calls, under one name. ``accelerator`` offers the same names."""

from mergekit.kernels.checksum import checksum
from mergekit.kernels.codec import CODES, all_finite
from mergekit.kernels.elementwise import CHUNK, arrays, count_lower, count_upper, keep_largest, load_chunk, on_host
from mergekit.kernels.fused import fuse
from mergekit.kernels.groups import group_gains
from mergekit.kernels.ranks import rank_gains
from mergekit.kernels.rounding import count_nonfinite, round_stochastically, store
from mergekit.kernels.span import gram, weighted_delta_sum, weighted_sum
from mergekit.kernels.sparse import (
    COARSE_BINS,
    ELECT_NONE,
    ELECT_UNWEIGHTED,
    ELECT_WEIGHTED,
    FINE_BINS,
    KEEP_ALL,
    KEEP_BAND,
    KEEP_GIVEN,
    KEEP_NONE,
    KEEP_RANDOM,
    KEEP_TOP,
    coarse_histogram,
    fine_histogram,
    kept_norms,
    sparse_sum,
)
from mergekit.kernels.statistics import differences, statistics
from mergekit.kernels.vectors import column_grams, row_grams, weighted_vectors

__all__ = [
    "CHUNK",
    "COARSE_BINS",
    "CODES",
    "ELECT_NONE",
    "ELECT_UNWEIGHTED",
    "ELECT_WEIGHTED",
    "FINE_BINS",
    "KEEP_ALL",
    "KEEP_BAND",
    "KEEP_GIVEN",
    "KEEP_NONE",
    "KEEP_RANDOM",
    "KEEP_TOP",
    "all_finite",
    "arrays",
    "checksum",
    "coarse_histogram",
    "column_grams",
    "count_lower",
    "count_nonfinite",
    "count_upper",
    "differences",
    "fine_histogram",
    "fuse",
    "gram",
    "group_gains",
    "keep_largest",
    "kept_norms",
    "load_chunk",
    "on_host",
    "rank_gains",
    "round_stochastically",
    "row_grams",
    "sparse_sum",
    "statistics",
    "store",
    "weighted_delta_sum",
    "weighted_sum",
    "weighted_vectors",
]
