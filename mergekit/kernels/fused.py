"""Elementwise functions compiled to one loop, and the passes over raw blocks that call it.

A program (see ``trace``) becomes a C function of one block, whose elements are in the processor's first cache. The
passes are compiled once for all programs, and call one by its address.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from mergekit.kernels.codec import BLOCK, encode
from mergekit.kernels.elementwise import ALL, mark_largest, tally_lower, tally_upper
from mergekit.kernels.jit import kernel, reassociating_kernel
from mergekit.kernels.span import load_vectors
from mergekit.kernels.trace import Program, record

__all__ = ["Fused", "fuse", "lower_pass", "merge_pass", "sums_pass", "upper_pass"]

_POINTER = types.CPointer(types.float32)
_SIGNATURE = types.void(_POINTER, _POINTER, types.int64, _POINTER)

_CODE = {
    "to_float": "one if {} else zero",
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "negative": "-{}",
    "absolute": "abs({})",
    "sqrt": "np.sqrt({})",
    "sign": "(one if {0} > zero else zero) - (one if {0} < zero else zero) if {0} == {0} else {0}",
    "minimum": "{0} if {0} <= {1} or {0} != {0} else {1}",
    "maximum": "{0} if {0} >= {1} or {0} != {0} else {1}",
    "where": "{1} if {0} else {2}",
    "less": "{} < {}",
    "less_equal": "{} <= {}",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "equal": "{} == {}",
    "not_equal": "{} != {}",
    "bitwise_and": "{} and {}",
    "bitwise_or": "{} or {}",
    "bitwise_xor": "{} != {}",
    "logical_and": "{} and {}",
    "logical_or": "{} or {}",
    "invert": "not {}",
    "logical_not": "not {}",
}
"""Each operation of a program, on single numbers. Of numpy's results on NaN they keep which are NaN."""

_compiled: dict[Program, Any] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """A compiled function of elements: where its machine code is, and the numbers (float32 [k]) to call it with."""

    address: int
    scalars: np.ndarray
    program: Program

    @property
    def results(self) -> int:
        """How many numbers it gives for an element."""
        return len(self.program.results)


def fuse(
    function: Callable[..., Any],
    arrays: int,
    extra: tuple[Any, ...] = (),
    parameters: Mapping[str, Any] = MappingProxyType({}),
    *,
    sums: bool = False,
) -> Fused:
    """Compile what ``function(xp, x, *extra, **parameters)`` does to each element of ``arrays`` float32 arrays.

    See ``trace.record``. Raises UntraceableError if that can't be told. A program that was compiled before, by any run
    on this machine, is not compiled again.
    """
    trace = record(function, arrays, extra, parameters, sums=sums)
    with _lock:
        if trace.program not in _compiled:
            _compiled[trace.program] = _compile(trace.program)
        return Fused(_compiled[trace.program].address, trace.scalars, trace.program)


def _compile(program: Program) -> Any:
    """The C function ``block(x, scalars, count, out)`` of a program; x and out are rows of BLOCK elements.

    numba keeps machine code for a source file, so the text is written to the kernels' cache; what runs is the text made
    here, never what a file holds. The name is that of the text, since machine code is found by name. A cache that is
    damaged, or can't be read, is done without.
    """
    name = f"block_{blake2b(_source(program, 'block').encode(), digest_size=12).hexdigest()}"
    text = _source(program, name)
    path = Path(numba.config.CACHE_DIR) / "fused" / f"{name}.py"
    names: dict[str, Any] = {"__name__": __name__, "np": np, "one": np.float32(1), "zero": np.float32(0)}
    exec(compile(text, str(path), "exec"), names)  # made of the table above and of positions
    for cache in (True, False):
        if cache and not _is_kept(path, text):
            continue
        try:
            return numba.cfunc(_SIGNATURE, nopython=True, cache=cache, error_model="numpy")(names[name])
        except Exception:  # unpickling raises many types
            if not cache:
                raise
    raise AssertionError("compiled or raised")


def _source(program: Program, name: str) -> str:
    before, loop = [], []
    for position, (operation, arguments) in enumerate(program.operations):
        if operation == "scalar":
            before.append(f"    v{position} = s[{arguments[0]}]")
        elif operation == "input":
            loop.append(f"        v{position} = x[i + {arguments[0] * BLOCK}]")
        else:
            loop.append(f"        v{position} = {_CODE[operation].format(*(f'v{a}' for a in arguments))}")
    stores = [f"        out[i + {row * BLOCK}] = v{position}" for row, position in enumerate(program.results)]
    return "\n".join([f"def {name}(x, s, n, out):", *before, "    for i in range(n):", *loop, *stores, ""])


def _is_kept(path: Path, text: str) -> bool:
    """Whether the source lies in the cache, where it is put if need be."""
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
                file.write(text)
            os.chmod(file.name, 0o644)  # for others who share the cache
            os.replace(file.name, path)
        return True
    except OSError:
        return False


@intrinsic
def _call(typing_context: Any, address: Any, x: Any, scalars: Any, count: Any, out: Any) -> Any:
    """Call the C function at ``address``."""
    from llvmlite import ir

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def data(position: int) -> Any:
            array = context.make_array(signature.args[position])(context, builder, args[position])
            return array.data

        pointer = ir.FloatType().as_pointer()
        function = ir.FunctionType(ir.VoidType(), [pointer, pointer, ir.IntType(64), pointer]).as_pointer()
        target = builder.inttoptr(args[0], function)
        builder.call(target, [data(1), data(2), args[3], data(4)])
        return context.get_dummy_value()

    return types.void(types.int64, x, scalars, types.int64, out), code


@kernel
def upper_pass(raw: np.ndarray, codes: np.ndarray, base: int, count: int, key: int, scalars: np.ndarray,
                totals: np.ndarray) -> int:  # fmt: skip
    """``elementwise.count_upper`` of the keys of ``count`` elements. ``raw`` and ``codes`` are as in ``span``.

    ``key`` is the address of the key's program, ``scalars`` float32 [k] its numbers. ``base`` -1 subtracts nothing;
    0 takes the first model from the others, and the program is about those.
    """
    origin, x, keys = _scratch(len(codes), 1)
    nonzero = 0
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        load_vectors(raw, codes, base, start, size, origin, x)
        _call(key, x[base + 1 :], scalars, size, keys)
        nonzero += tally_upper(keys[0, :size], totals)
    return nonzero


@kernel
def lower_pass(raw: np.ndarray, codes: np.ndarray, base: int, count: int, key: int, scalars: np.ndarray, upper: int,
                totals: np.ndarray) -> None:  # fmt: skip
    """``elementwise.count_lower`` of the keys of ``count`` elements; the other arguments are as in ``upper_pass``."""
    origin, x, keys = _scratch(len(codes), 1)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        load_vectors(raw, codes, base, start, size, origin, x)
        _call(key, x[base + 1 :], scalars, size, keys)
        tally_lower(keys[0, :size], upper, totals)


@kernel
def sums_pass(raw: np.ndarray, codes: np.ndarray, base: int, count: int, terms: int, scalars: np.ndarray, key: int,
               key_scalars: np.ndarray, threshold: int, left: int, sums: np.ndarray) -> int:  # fmt: skip
    """Add the terms of ``count`` elements, of those selected, to ``sums`` (float64 [m]).

    ``terms`` is the address of their program. Selected are all elements if ``threshold`` is ``ALL`` (the key is then
    not called), else what ``elementwise.keep_largest`` keeps; returned is what it returns.
    """
    origin, x, keys = _scratch(len(codes), 1)
    rows = np.empty((len(sums), BLOCK), np.float32)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        load_vectors(raw, codes, base, start, size, origin, x)
        left = _select(x[base + 1 :], key, key_scalars, threshold, left, size, keys)
        _call(terms, x[base + 1 :], scalars, size, rows)
        for m in range(len(sums)):
            sums[m] += _sum(rows[m], size)
    return left


@kernel
def merge_pass(raw: np.ndarray, codes: np.ndarray, base: int, count: int, function: int, scalars: np.ndarray, key: int,
                key_scalars: np.ndarray, threshold: int, left: int, factor: np.float32, out: np.ndarray,
                out_code: int) -> tuple[int, bool]:  # fmt: skip
    """The function of ``count`` elements, of those selected, times ``factor``, plus the base, rounded into ``out``.

    ``function`` is the address of its program; the selection is as in ``sums_pass``. Returns what is left of the ties
    and whether the result is finite.
    """
    origin, x, keys = _scratch(len(codes), 1)
    result = np.empty((1, BLOCK), np.float32)
    finite = True
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        load_vectors(raw, codes, base, start, size, origin, x)
        left = _select(x[base + 1 :], key, key_scalars, threshold, left, size, keys)
        _call(function, x[base + 1 :], scalars, size, result)
        if factor != np.float32(1):
            for i in range(size):
                result[0, i] *= factor
        if base >= 0:
            for i in range(size):
                result[0, i] += origin[i]
        finite &= encode(result[0], size, out, out_code, start)
    return left, finite


@kernel
def _scratch(models: int, results: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A block of the base, of all models, and of results."""
    return np.zeros(BLOCK, np.float32), np.empty((models, BLOCK), np.float32), np.empty((results, BLOCK), np.float32)


@kernel
def _select(x: np.ndarray, key: int, scalars: np.ndarray, threshold: int, left: int, size: int,
            keys: np.ndarray) -> int:  # fmt: skip
    """Set to zero what is not selected."""
    if threshold == ALL:
        return left
    _call(key, x, scalars, size, keys)
    kept = np.empty(size, np.float32)
    # Once no tie is left to keep, none has to be looked for: keys are not negative, so their bits order like them.
    left = mark_largest(keys[0, :size], np.uint32(threshold + (left == 0)), left, kept)
    for m in range(len(x)):
        for i in range(size):
            x[m, i] *= kept[i]
    return left


@reassociating_kernel
def _sum(values: np.ndarray, count: int) -> np.float32:
    """The sum of at most a block of float32 numbers, in float32."""
    total = np.float32(0)
    for i in range(count):
        total += values[i]
    return total
