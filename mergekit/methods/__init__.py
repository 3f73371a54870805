"""Merge methods: one small file each, a declaration and a pure function.

Here: the mathematics of merging. Not here: files, tensor names, devices, threads; the engine deals with those.
To add one: write ``methods/<name>.py`` with a function decorated by ``@method`` and import it below.
"""

from mergekit.methods import linear, slerp, task_arithmetic, ties, dare, passthrough  # noqa: F401, I001 (the order of help)
from mergekit.methods.spec import Method, get_method, method_names

__all__ = ["Method", "get_method", "method_names"]
