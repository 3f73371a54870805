"""Merge methods: one small file each, a declaration and a pure function.

Here: the mathematics of merging. Not here: files, tensor names, devices, threads; the engine deals with those.
To add one: write ``methods/<name>.py`` with a function decorated by ``@method`` and import it below. Methods outside
this package use the same decorator (docs/extending.md).
"""

# The order of import is the order of help and documentation.
from mergekit.methods import (  # noqa: F401, I001
    linear, slerp, nuslerp, multislerp, karcher, task_arithmetic, ties, dare_ties, dare_linear,
    breadcrumbs, breadcrumbs_ties, della, della_linear, cabs, model_stock, nearswap, sce, ram, ramplus_tl, arcee_fusion,
    tsv_m, iso_c, iso_cts, star, wudi, passthrough,
)  # fmt: skip
from mergekit.methods.registry import get_method, load_method_file, method_names, source_digest
from mergekit.methods.rules import (
    GroupTop,
    KeepAll,
    KeepRule,
    MagnitudeBand,
    RandomKeep,
    RankKeep,
    SparseMerge,
    TopMagnitude,
)
from mergekit.methods.spec import (
    Choice,
    Elementwise,
    Flag,
    Integer,
    Method,
    ParameterError,
    Real,
    Span,
    Sparse,
    Whole,
    each,
    ignored,
    method,
    once,
)

__all__ = [
    "Choice",
    "Elementwise",
    "Flag",
    "GroupTop",
    "Integer",
    "KeepAll",
    "KeepRule",
    "MagnitudeBand",
    "Method",
    "ParameterError",
    "RandomKeep",
    "RankKeep",
    "Real",
    "Span",
    "Sparse",
    "SparseMerge",
    "TopMagnitude",
    "Whole",
    "each",
    "get_method",
    "ignored",
    "load_method_file",
    "method",
    "method_names",
    "once",
    "source_digest",
]
