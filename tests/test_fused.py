"""Elementwise functions compiled to a loop compute what numpy computes with arrays, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import merge
from kernel_cases import pack, unpack
from mergekit.dtypes import BF16, F16, F32, F64
from mergekit.execute.passes import _ChunkPasses, _FusedPasses
from mergekit.kernels import cpu, fused
from mergekit.kernels.elementwise import ALL
from mergekit.kernels.trace import UntraceableError, record
from mergekit.methods import get_method
from mergekit.methods.spec import REGISTRY, Elementwise, Real, method, once

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0**-140, 2.0**100, np.inf, -np.inf, np.nan, 3.4e38, 1e-30]
SIZES = [1, 7, 2048, 5000]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "arithmetic": lambda xp, x: (x[0] + x[1] * 2 - 0.1) / (x[2] - 3) + -x[1],
    "reflected": lambda xp, x: (1 - x[0]) * (2 / x[1]) + (1 + x[2]) * (0.3 * x[0]),
    "functions": lambda xp, x: xp.abs(x[0]) + xp.sqrt(abs(x[1])) * xp.sign(x[2]) + x[0] ** 2,
    "extremes": lambda xp, x: xp.minimum(x[0], x[1]) + xp.maximum(x[1], 0.5) * xp.clip(x[2], -1.0, 1.0),
    "choice": lambda xp, x: xp.where(x[0] > x[1], x[2], 0.25) + xp.where(x[2] != x[1], 1, x[0]),
    "truth": lambda xp, x: xp.asarray((x[0] < 0) & ~(x[1] >= x[2]) | (x[2] == 1) ^ (x[0] <= 1), dtype=xp.float32),
    "truth with numbers": lambda xp, x: (x[0] > 0) * x[1] + (x[2] < 1) * x[2],
    "an input": lambda xp, x: x[1],
    "a sum of many": lambda xp, x: sum(x[1:], x[0]) * (1.0 / len(x)),
}


def values_of(count: int, size: int) -> list[np.ndarray]:
    random = np.random.default_rng([count, size])
    models = np.float32(random.standard_normal((count, size)))
    odd = np.float32(random.choice(SPECIAL, (count, size)))
    return list(np.where(random.random((count, size)) < 0.3, odd, models))


PARAMETERS: dict[str, dict[str, float]] = {"nearswap": {"t": 0.3}, "sce": {"select_topk": 0.4}}


def models_for(name: str) -> list[np.ndarray]:
    return list(np.random.default_rng(1).standard_normal((2 if name == "nearswap" else 4, 70, 331)))


def computed(function: Callable[..., Any], models: list[np.ndarray]) -> np.ndarray:
    """The function's result by its program, in float32."""
    made = fused.fuse(function, len(models))
    raw, codes = pack(models, [F32] * len(models))
    size = len(models[0])
    out = np.full(size * 4 + 64, 0xAB, np.uint8)
    left, finite = fused.merge_pass(
        raw, codes, -1, size, made.address, made.scalars, 0, made.scalars, ALL, 5, np.float32(1), out, cpu.CODES[F32]
    )
    assert (out[size * 4 :] == 0xAB).all()
    result = unpack(out, F32, size).astype(np.float32)
    assert left == 5
    assert finite == np.isfinite(result).all()
    return result


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    is_number = ~np.isnan(want)
    np.testing.assert_array_equal(got[is_number], want[is_number])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_computes_what_numpy_does(name, size):
    models = values_of(3, size)
    with np.errstate(all="ignore"):
        want = np.asarray(FUNCTIONS[name](np, tuple(models)))
    assert want.dtype == np.float32
    assert_same(computed(FUNCTIONS[name], models), want)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    """The text of an expression of float32 arrays a and b."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(["a", "b"]))
    left, right = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    number = draw(st.floats(-8, 8, width=32))
    return draw(
        st.sampled_from([
            f"({left} + {right})", f"({left} - {number!r})", f"({left} * {right})", f"({left} / {number!r})",
            f"xp.abs({left})", f"xp.where({left} > {right}, {left}, {number!r})", f"xp.minimum({left}, {right})",
            f"(({left} <= {number!r}) * {right})", f"xp.asarray(~({left} < {right}), dtype=xp.float32)",
        ])
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(expressions())
def test_random_expressions(text):
    function = eval(f"lambda xp, x: (lambda a, b: {text})(*x)")
    models = values_of(2, 300)
    with np.errstate(all="ignore"):
        assert_same(computed(function, models), function(np, tuple(models)))


UNTRACEABLE: dict[str, Callable[..., Any]] = {
    "a branch on an element": lambda xp, x: x[0] if x[0] > 0 else x[1],
    "a function that is not elementwise": lambda xp, x: xp.cumsum(x[0]),
    "an order of elements": lambda xp, x: x[0][::-1],
    "the number of elements": lambda xp, x: x[0] * len(x[0]),
    "numbers of numpy, which are wider": lambda xp, x: x[0] * np.float64(0.1),
    "wider sums of truth values": lambda xp, x: (x[0] > 0) + (x[1] > 0),
    "truth values and a plain number": lambda xp, x: (x[0] > 0) * 0.1,
    "a choice among plain numbers": lambda xp, x: xp.where(x[0] > 0, 0.1, 0.2),
    "bits of numbers": lambda xp, x: x[0] & 1,
    "another power": lambda xp, x: x[0] ** 3,
    "another type": lambda xp, x: xp.asarray(x[0], dtype=xp.float64),
    "in place": lambda xp, x: x[0].__imul__(2),
    "no array": lambda xp, x: 1.0,
    "several arrays": lambda xp, x: (x[0], x[1]),
    "a sum": lambda xp, x: xp.sum(x[0]),
    "truth values": lambda xp, x: x[0] > x[1],
    "a look at the type": lambda xp, x: x[0] * 2 if isinstance(x[0], np.ndarray) else x[0] * 3,
    "a look at an attribute": lambda xp, x: x[0] * 2 if hasattr(x[0], "dtype") else x[0] * 3,
    "a look with a default": lambda xp, x: x[0] * getattr(x[0], "size", 3),
    "a product with an array": lambda xp, x: np.dot(np.array([0.25, 0.75]), x),
    "an average of arrays": lambda xp, x: np.average(x, axis=0, weights=[0.25, 0.75]),
    "an array of arrays": lambda xp, x: np.array(x).sum(),
    "an array of an array": lambda xp, x: np.array(x[0]) * np.float64(0.1),
    "a limited number": lambda xp, x: xp.clip(0.1, x[0], x[1]) * 0.1,
    "too many steps": lambda xp, x: sum((abs(x[0] - i / 7) for i in range(99)), x[1]),
    "an end": lambda xp, x: sys.exit(0),
}


def caught(xp: Any, x: tuple[Any, ...]) -> Any:
    try:
        return xp.tanh(x[0])
    except Exception:
        return x[0]


UNTRACEABLE["a fault that is caught"] = caught


@pytest.mark.parametrize("name", ["a tuple", "a list", "an array", "a number"])
def test_sums_come_in_one_array(name):
    made = {
        "a tuple": lambda xp, x: (xp.sum(x[0]), xp.sum(x[1])),
        "a list": lambda xp, x: [xp.sum(x[0])],
        "an array": lambda xp, x: x[0],
        "a number": lambda xp, x: xp.sum(x[0]),
    }
    with pytest.raises(UntraceableError):
        record(made[name], 2, sums=True)


def test_where_sums_decide_what_is_done_arrays_do_it(tmp_path):
    """Whatever the process did before: the same bytes."""

    def measure(xp: Any, x: tuple[Any, ...], *, arrays: float) -> Any:
        return xp.stack([xp.count_nonzero(x[0] > 0)])

    t = once("arrays", Real(), 1.0, help="a parameter called as an argument of ours")

    @method("scratch", title="A", form=Elementwise(measure=measure), base="required", models=(1, None), params=[t])
    def scratch(xp: Any, x: tuple[Any, ...], sums: np.ndarray, *, arrays: float) -> Any:
        total = x[0] * arrays
        for _ in range(int(sums[0])):
            total = total + x[0]
        return total

    try:
        base, delta = np.zeros(40, np.float32), np.zeros(40, np.float32)
        for count in range(12):
            delta[:count] = 1
            before = len(fused._compiled)
            assert (merge("scratch", [base, delta], arrays=2.0) == delta * (2 + count)).all()
        assert len(fused._compiled) == before
    finally:
        del REGISTRY["scratch"]


@pytest.mark.parametrize("name", ["sce", "ramplus_tl"])
def test_sums_do_not_depend_on_blocks(name):
    """To the last digit: they are added up in the same order."""
    seen: list[list[float]] = []
    measured = _FusedPasses.measured

    def watched(self: Any, sums: np.ndarray) -> Any:
        seen.append(sums.tolist())
        return measured(self, sums)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_FusedPasses, "measured", watched)
        for block in (4096, 8192, 65536):
            merge(name, list(np.random.default_rng(5).standard_normal((4, 300, 501))), block=block)
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_cannot_be_recorded_is_said(name):
    with pytest.raises(UntraceableError):
        record(UNTRACEABLE[name], 2)


def test_numbers_are_arguments_of_the_program():
    """Another parameter or sum is no other program, or each tensor would be compiled anew."""
    function = get_method("sce").function
    first, second = (
        record(function, 3, (np.array(sums),), {"select_topk": 0.5}) for sums in ([1.0, 2, 3], [0.0, 0, 0])
    )
    assert first.program == second.program
    assert list(first.scalars) != list(second.scalars)


@pytest.mark.parametrize("name", [name for name, m in REGISTRY.items() if isinstance(m.form, Elementwise)])
def test_our_own_methods_are_all_compiled(name):
    fuse, seen = fused.fuse, []

    def watched(*args: Any, **parameters: Any) -> Any:
        made = fuse(*args, **parameters)
        seen.append(made)
        return made

    def arrays(*args: Any) -> None:
        raise AssertionError("called with arrays")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "fuse", watched)
        patch.setattr(_ChunkPasses, "merge", arrays)
        merge(name, models_for(name), **PARAMETERS.get(name, {}))
    form = get_method(name).form
    assert len(seen) == 1 + bool(form.key) + bool(form.measure)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_sums_and_selection_are_those_of_arrays(dtype):
    models = [np.float32(m) for m in np.random.default_rng(2).standard_normal((3, 5003))]
    models = [unpack(row, dtype, 5003).astype(np.float32) for row in pack(models, [dtype] * 3)[0]]
    raw, codes = pack(models, [dtype] * 3)
    deltas = [m - models[0] for m in models[1:]]
    key = fused.fuse(lambda xp, x: xp.abs(x[0]), 2)
    terms = fused.fuse(
        lambda xp, x: xp.stack([xp.sum(x[1]), xp.count_nonzero(x[0]), xp.sum(x[0] * x[1])]), 2, sums=True
    )
    keys = abs(deltas[0])
    threshold = np.sort(keys)[-1000]
    ties = int((keys == threshold).sum())
    kept = keys > threshold
    kept[np.flatnonzero(keys == threshold)[:1]] = True
    got = np.zeros(3)
    bits = int(threshold.view(np.uint32))
    left = fused.sums_pass(
        raw, codes, 0, 5003, terms.address, terms.scalars, key.address, key.scalars, bits, 1, got
    )  # fmt: skip
    a, b = (np.float64(d * kept) for d in deltas)
    assert left == 0
    assert ties >= 1
    np.testing.assert_allclose(got, [b.sum(), np.count_nonzero(a), (a * b).sum()], rtol=1e-5, atol=1e-4)
    upper, lower = np.zeros((4, cpu.COARSE_BINS), np.int64), np.zeros(cpu.FINE_BINS, np.uint32)
    nonzero = fused.upper_pass(raw, codes, 0, 5003, key.address, key.scalars, upper)
    fused.lower_pass(raw, codes, 0, 5003, key.address, key.scalars, bits >> 16, lower)
    all_bits = keys.view(np.uint32)
    assert nonzero == np.count_nonzero(keys)
    np.testing.assert_array_equal(upper.sum(axis=0), np.bincount(all_bits >> 16, minlength=cpu.COARSE_BINS))
    hits = all_bits[all_bits >> 16 == bits >> 16] & 0xFFFF
    np.testing.assert_array_equal(lower, np.bincount(hits, minlength=cpu.FINE_BINS))


@pytest.mark.parametrize("name", ["nearswap", "ram", "ramplus_tl", "sce"])
def test_arrays_give_the_same_bytes(monkeypatch, name):
    """What a function that can't be compiled falls back to. (Sums are rounded otherwise, so are sce's weights.)"""
    models, parameters = models_for(name), PARAMETERS.get(name, {})
    compiled = merge(name, models, **parameters)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UntraceableError("not today")

    monkeypatch.setattr(cpu, "fuse", refuse)
    np.testing.assert_allclose(merge(name, models, **parameters), compiled, rtol=0, atol=1e-6 if name == "sce" else 0)


@pytest.mark.parametrize("kind", ["compiled", "with arrays"])
def test_a_method_of_the_users(kind):
    t = once("t", Real(), 1.0, help="t")

    @method("scratch", title="A", form=Elementwise(), base="required", models=(1, None), params=[t])
    def scratch(xp: Any, x: tuple[Any, ...], *, t: float) -> Any:
        total = sum(x[1:], x[0])
        return xp.where(total > 0, total, t) if kind == "compiled" else xp.exp(total) * t

    try:
        base, a, b = np.float32(np.random.default_rng(3).standard_normal((3, 999)))
        total = (a - base) + (b - base)
        want = np.where(total > 0, total, 0.5) if kind == "compiled" else np.exp(np.float64(total)) * 0.5
        np.testing.assert_allclose(merge("scratch", [base, a, b], t=0.5), base + want, rtol=1e-5, atol=1e-6)
    finally:
        del REGISTRY["scratch"]


SCRIPT = """
from mergekit.kernels import fused
fused.fuse(lambda xp, x: x[0] * 3.0 + xp.abs(x[1]) - x[2], 3)
print(*(made.cache_hits for made in fused._compiled.values()))
"""


def run_script(cache: Path) -> int:
    env = {**os.environ, "MERGEKIT_KERNEL_CACHE": str(cache)}
    env.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("damage", ["truncated", "a folder in its place", "other code"])
def test_a_damaged_cache_is_done_without(tmp_path, damage):
    run_script(tmp_path)
    (source,) = tmp_path.rglob("block_*.py")
    assert source.stat().st_mode & 0o444 == 0o444
    if damage == "truncated":
        for path in source.parent.rglob("*.nb*"):
            path.write_bytes(path.read_bytes()[:20])
        for path in tmp_path.rglob("block_*.nb*"):
            path.write_bytes(path.read_bytes()[:20])
    elif damage == "other code":
        source.write_text("raise SystemExit(3)")
    else:
        source.unlink()
        source.mkdir()
    run_script(tmp_path)


def test_a_program_is_compiled_once_on_a_machine(tmp_path):
    hits = []
    for folder in ("cache", "cache", "file/below"):
        (tmp_path / "file").touch()
        hits.append(run_script(tmp_path / folder))
    assert hits == [0, 1, 0]
