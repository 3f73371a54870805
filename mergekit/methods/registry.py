"""Find merge methods by name: built in, of installed packages, of files that the user names.

A package offers methods through the entry-point group ``mergekit.methods``: each entry names a module, which is
imported when a name is asked for that is not built in, or when all methods are listed.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from mergekit.errors import UsageError, nearest
from mergekit.methods.spec import REGISTRY, Method

__all__ = ["get_method", "load_method_file", "method_names", "source_digest"]

_GROUP = "mergekit.methods"
_LOG = logging.getLogger("mergekit")


def get_method(name: str) -> Method:
    """The method called ``name``; UsageError with the nearest name otherwise."""
    if name not in REGISTRY:
        _load_packages()
    if name not in REGISTRY:
        raise UsageError(f"no merge method '{name}'. {nearest(name, REGISTRY)}")
    return REGISTRY[name]


def method_names() -> tuple[str, ...]:
    """Every registered name: those built in first, in the order of the documentation."""
    _load_packages()
    return tuple(REGISTRY)


@lru_cache(maxsize=1)
def _load_packages() -> None:
    """Import what installed packages offer, once. One that fails is told of and left out."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=_GROUP):
        try:
            entry.load()
        except Exception as error:  # somebody else's code; ours goes on without
            _LOG.warning("the merge methods of '%s' can't be used: %s: %s", entry.value, type(error).__name__, error)


@lru_cache
def load_method_file(path: Path) -> None:
    """Run a Python file that registers methods, once. UsageError says why it can't be run."""
    if not path.is_file():
        raise UsageError(f"there is no file {path} to load methods from")
    name = f"mergekit_method_file_{blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    before = set(REGISTRY)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        for added in set(REGISTRY) - before:
            del REGISTRY[added]
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"cannot load methods from {path}: {reason}") from None
    if set(REGISTRY) == before:
        raise UsageError(f"{path} registers no merge method; decorate a function with @method")


def source_digest(method: Method) -> str:
    """What identifies the code of a method that is not built in: a digest of its file. Empty for our own."""
    module = sys.modules.get(method.function.__module__)
    path = getattr(module, "__file__", None)
    if method.function.__module__.startswith("mergekit.methods.") or path is None:
        return ""
    return blake2b(Path(path).read_bytes(), digest_size=12).hexdigest()
