"""Merge methods: one small file each, a declaration and a pure function.

Here: the mathematics of merging. Not here: files, tensor names, devices, threads; the engine deals with those.
To add one: write ``methods/<name>.py`` with a function decorated by ``@method`` and import it below.
"""

# The order of import is the order of help and documentation.
from mergekit.methods import linear, slerp, task_arithmetic, ties, dare_ties, dare_linear, passthrough  # noqa: F401, I001
from mergekit.methods.spec import Method, get_method, method_names

__all__ = ["Method", "get_method", "method_names"]
