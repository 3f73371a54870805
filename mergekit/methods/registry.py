"""Find merge methods by name: built in, of installed packages, of files that the user names.

A package offers methods through the entry-point group ``mergekit.methods``: each entry names a module, which is
imported when a name is asked for that is not built in, or when all methods are listed.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import marshal
import sys
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from mergekit.errors import UsageError, nearest
from mergekit.methods.guard import is_built_in
from mergekit.methods.spec import DELTA_OPTIONS, REGISTRY, REQUIRED, Elementwise, Method, ParameterError, Sparse, Whole

__all__ = ["get_method", "load_method_file", "method_names", "source_digest"]

_GROUP = "mergekit.methods"
_LOG = logging.getLogger("mergekit")
_FILES: dict[Path, tuple[bytes, tuple[str, ...]]] = {}
"""The method files that were run: a digest of their text, and the names that they registered."""


def get_method(name: str | Method) -> Method:
    """The method called ``name``; UsageError with the nearest name otherwise. A method is what it is."""
    if isinstance(name, Method):
        return name
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
            _registered(entry.load)
        except (Exception, SystemExit) as error:  # somebody else's code; ours goes on without
            _LOG.warning("the merge methods of '%s' can't be used: %s", entry.value, _reason(error))


def load_method_file(path: str | Path) -> None:
    """Run a Python file that registers methods: once, and again if its text has changed since.

    UsageError says why it can't be run; then none of its methods is registered.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no file {path} to load methods from")
    place = path.resolve()
    try:
        digest = blake2b(place.read_bytes()).digest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    known, names = _FILES.get(place, (b"", ()))
    if known == digest and all(name in REGISTRY for name in names):
        return
    _FILES.pop(place, None)
    for name in names:
        REGISTRY.pop(name, None)
    try:
        added = _registered(lambda: _run(path, place))
    except (Exception, SystemExit) as error:
        raise UsageError(f"cannot load methods from {path}: {_reason(error)}") from None
    if not added:
        raise UsageError(f"{path} registers no merge method; decorate a function with @method")
    _FILES[place] = digest, added


def _run(path: Path, place: Path) -> None:
    """Import the file at ``place`` as a module of its own."""
    name = f"mergekit_method_file_{blake2b(str(place).encode(), digest_size=6).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise UsageError("its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # Not by the loader: its cache of compiled files knows changes by whole seconds only.
        exec(compile(place.read_bytes(), str(place), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise


def _registered(load: Callable[[], object]) -> tuple[str, ...]:
    """The names that ``load`` registers; if it fails, none of them stays."""
    before = set(REGISTRY)
    try:
        load()
        added = tuple(name for name in REGISTRY if name not in before)
        for name in added:
            _check_declaration(REGISTRY[name])
            _check_signature(REGISTRY[name])
        return added
    except BaseException:
        for name in [name for name in REGISTRY if name not in before]:
            del REGISTRY[name]
        raise


def _check_declaration(method: Method) -> None:
    """UsageError if parts of a declaration contradict one another."""
    form, names = method.form, [p.name for p in method.params]
    fault = None
    if form.space not in ("weights", "deltas"):
        fault = f"'{form.space}' is not a space; it has 'weights' and 'deltas'"
    elif isinstance(form, Sparse) and method.base != "required":
        fault = "the sparse form needs base='required'"
    elif isinstance(form, Elementwise) and (form.key is None) != (form.keep is None):
        fault = "'key' and 'keep' go together"
    elif isinstance(form, Whole) and not isinstance(form.workspace, (int, float)):
        fault = f"'workspace' is a number, not {form.workspace!r}"
    elif twice := [name for name in names if names.count(name) > 1 or name in {p.name for p in DELTA_OPTIONS}]:
        fault = f"the name of parameter '{twice[0]}' is taken"
    for parameter in method.params:
        if fault or parameter.default is REQUIRED or parameter.default is None:
            continue
        try:
            parameter.kind.read(parameter.default)
        except ParameterError as error:
            fault = f"the default of '{parameter.name}': {error}"
    if fault:
        raise UsageError(f"the declaration of method '{method.name}': {fault}")


def _check_signature(method: Method) -> None:
    """UsageError if the function can't be called with what the declaration says that it gets."""
    form = method.form
    data = 1
    if isinstance(form, Sparse):
        data = 0
    elif isinstance(form, Elementwise):
        data = 3 if form.measure else 2
    try:
        signature = inspect.signature(method.function, follow_wrapped=False)
        signature.bind(*[None] * data, **{p.argument: None for p in method.params if p.used})
    except TypeError as error:
        raise UsageError(f"the function of method '{method.name}' does not fit its declaration: {error}") from None


def _reason(error: BaseException) -> str:
    """What an exception of somebody else's code says, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, UsageError):
        return text
    if isinstance(error, SyntaxError):
        return f"line {error.lineno} is no Python ({error.msg})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def source_digest(method: Method) -> str:
    """What identifies the code of a method that is not built in: a digest of its file. Empty for our own."""
    if is_built_in(method):
        return ""
    module = sys.modules.get(method.function.__module__)
    path = getattr(module, "__file__", None)
    if path is not None:
        return blake2b(Path(path).read_bytes(), digest_size=12).hexdigest()
    code = getattr(method.function, "__code__", None)  # typed into a session, not in any file
    return blake2b(marshal.dumps(code) if code else b"?", digest_size=12).hexdigest()
