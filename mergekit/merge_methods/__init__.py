"""Merge methods under the module name that third-party code imports: define, register, look up, call on tensors.

Here: names, mapped onto ``mergekit.methods`` and ``mergekit.api``. New code imports those (docs/extending.md).
"""

from mergekit.api.in_memory import merge_state_dicts, merge_tensors
from mergekit.methods import Method, get_method, method, method_names
from mergekit.methods.spec import register

__all__ = ["Method", "get", "merge_state_dicts", "merge_tensors", "method", "register", "registered_methods"]


def get(name: str) -> Method:
    """The method called ``name``; UsageError with the nearest name otherwise."""
    return get_method(name)


def registered_methods() -> tuple[str, ...]:
    """The names of all methods: those built in first."""
    return method_names()
