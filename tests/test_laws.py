"""The promises that methods make in their declarations, on random tensors and parameters; and those that all make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from engine import merge
from mergekit.dtypes import BF16, F16, F32
from mergekit.methods import Choice, Flag, Integer, Method, ParameterError, Real, Whole, get_method, method_names

METHODS = method_names()
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

RANGES = {"weight": (0.1, 1.5), "density": (0.3, 0.7), "epsilon": (1e-6, 0.2), "gamma": (0.0, 0.2), "t": (0.0, 1.0)}
"""Where values make sense, for parameters whose type does not say."""


def obeying(law: str) -> list[str]:
    return [name for name in METHODS if law in get_method(name).laws]


def values(method: Method, name: str) -> st.SearchStrategy[Any]:
    """Values of a parameter, by its declaration."""
    parameter = method.parameter(name)
    assert parameter is not None
    kind = parameter.kind
    if isinstance(kind, Flag):
        return st.booleans()
    if isinstance(kind, Choice):
        return st.sampled_from(kind.words)
    if isinstance(kind, Integer):
        return st.integers(max(kind.low or 1, 1), min(kind.high or 64, 64))
    assert isinstance(kind, Real)
    if parameter.default is None:
        return st.none()
    low, high = RANGES.get(name, (0.1, 1.0))
    if (name == "epsilon" and "ram" in method.name) or method.name == "nearswap":
        low, high = 1e-6, 3e-5  # as small as the deltas that the laws are held on
    low = low if kind.low is None else max(low, kind.low)
    return st.floats(low, high if kind.high is None else min(high, kind.high))


@st.composite
def parameters(draw: Any, method: Method, inputs: int, fixed: dict[str, Any]) -> dict[str, Any]:
    """A value for each parameter, one for each model where it takes so many."""
    found: dict[str, Any] = {}
    for parameter in method.params:
        if not parameter.used or parameter.name in fixed:
            continue
        strategy = values(method, parameter.name)
        if parameter.scope == "once":
            found[parameter.name] = draw(strategy)
        else:
            count = inputs - (parameter.scope == "each" and method.base == "required")
            found[parameter.name] = tuple(draw(strategy) for _ in range(count))
    return {**found, **fixed}


def counts(method: Method) -> list[int]:
    """Numbers of inputs to try: with the base where one is required."""
    return [n for n in (2, 3, 4) if method.takes(n)] or [method.least]


@st.composite
def cases(draw: Any, name: str, **fixed: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    """A base, fine-tunes of it, and parameters."""
    method = get_method(name)
    inputs = draw(st.sampled_from(counts(method)))
    shape = draw(st.sampled_from([(24, 40), (7, 33), (130,), (3, 5, 8)]))
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    base = random.standard_normal(shape)
    arrays = [
        base,
        *(base + draw(st.sampled_from([1.0, 0.1])) * random.standard_normal(shape) for _ in range(inputs - 1)),
    ]
    return [a.astype(np.float32) for a in arrays], draw(parameters(method, inputs, fixed))


def result(name: str, inputs: list[np.ndarray], **more: Any) -> np.ndarray:
    try:
        return merge(name, inputs, **more)
    except ParameterError:
        assume(False)
        raise


def fixed(name: str, **wanted: Any) -> dict[str, Any]:
    """Those of the wanted parameters that a method has."""
    return {key: value for key, value in wanted.items() if get_method(name).parameter(key)}


def test_every_law_is_promised_by_somebody():
    from mergekit.methods.spec import LAWS

    promised = {law for name in METHODS for law in get_method(name).laws}
    assert promised == set(LAWS)


@pytest.mark.parametrize("name", obeying("equal"))
@QUICK
@given(data=st.data())
def test_equal_inputs_return_themselves(name, data):
    wanted = fixed(name, normalize=True, normalize_weights=True)
    inputs, more = data.draw(cases(name, **wanted))
    same = [inputs[0]] * len(inputs)
    got = result(name, same, **more)
    assert abs(got - same[0]).max() <= 3e-6 * abs(same[0]).max()


@pytest.mark.parametrize("name", obeying("zero"))
@QUICK
@given(data=st.data())
def test_weights_of_zero_leave_the_base(name, data):
    inputs, more = data.draw(cases(name, weight=0.0))
    assert np.array_equal(result(name, inputs, **more), inputs[0].astype(np.float64))


@pytest.mark.parametrize("name", obeying("dense"))
@QUICK
@given(data=st.data())
def test_density_one_keeps_everything(name, data):
    """Nothing is dropped or rescaled: any keep rule gives what the task vectors themselves give."""
    weight = (0.5, 0.75)
    inputs, more = data.draw(cases(name, density=1.0, weight=weight, **{"lambda": 1.0, "normalize": False}))
    assume(len(inputs) == 3)
    got = result(name, inputs, **more)
    deltas = [w * (np.float64(x) - inputs[0]) for w, x in zip(weight, inputs[1:], strict=True)]
    total = sum(deltas)
    if "ties" in name or name == "della":
        elected = np.sign(total if more.get("elect") != "unweighted" else sum(d / w for d, w in zip(deltas, weight)))  # noqa: B905
        total = sum(d * (np.sign(d) == elected) for d in deltas)
    np.testing.assert_allclose(got, inputs[0] + total, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", obeying("symmetric"))
@QUICK
@given(data=st.data())
def test_the_order_of_models_does_not_matter(name, data):
    method = get_method(name)
    inputs, more = data.draw(cases(name))
    first = int(method.base == "required")
    order = data.draw(st.permutations(range(first, len(inputs))))
    positions = (*range(first), *order)
    shuffled = {}
    for key, value in more.items():
        own = method.parameter(key).scope  # type: ignore[union-attr]
        start = first if own == "each" else 0
        shuffled[key] = tuple(value[p - start] for p in positions if p >= start) if isinstance(value, tuple) else value
    one = result(name, inputs, **more)
    # The positions in the recipe go with the models: they name their random masks.
    two = result(name, [inputs[p] for p in positions], models=positions, **shuffled)
    # Sums in another order may elect another sign where they nearly cancel.
    near = abs(one - two) <= 1e-5 * max(1.0, abs(one).max())
    assert near.mean() > 0.995


@pytest.mark.parametrize("name", obeying("deltas"))
@QUICK
@given(data=st.data())
def test_tiny_deltas_keep_their_direction(name, data):
    inputs, more = data.draw(cases(name))
    length = np.linalg.norm(inputs[0])
    deltas = [(x - inputs[0]) * (1e-4 * length / np.linalg.norm(x - inputs[0])) for x in inputs[1:]]
    models = [(inputs[0] + d).astype(np.float32) for d in deltas]
    # What float32 holds of the deltas, once on their base and once on nothing.
    held = [m - inputs[0] for m in models]
    got = result(name, [inputs[0], *models], **more) - inputs[0]
    alone = result(name, [np.zeros_like(inputs[0]), *held], **more)
    scale = np.linalg.norm(got) * np.linalg.norm(alone)
    assert scale == 0 or (got * alone).sum() / scale > 1 - 1e-3


EDGES = {
    "zeros": np.zeros((4, 6)),
    "one": np.array([1.5]),
    "scalar": np.array(0.5),
    "conv": np.linspace(-1, 1, 30).reshape(5, 1, 6),
    "column": np.linspace(-1, 1, 9).reshape(9, 1),
    "row": np.linspace(-1, 1, 9).reshape(1, 9),
    "huge": np.linspace(-1e18, 1e18, 60).reshape(6, 10),
    "tiny": np.linspace(-1e-30, 1e-30, 60).reshape(6, 10),
    "empty": np.zeros((0, 4)),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_results_are_finite_for_odd_tensors(name, dtype):
    method = get_method(name)
    given_values = fixed(name, weight=0.5, density=0.5, t=0.3, epsilon=0.1 if "della" in name else 1e-5)
    for edge, base in EDGES.items():
        if dtype == F16 and edge == "huge":
            base = base / 1e14
        for count in counts(method):
            random = np.random.default_rng(count)
            inputs = [np.float32(base * (1 + 0.1 * m * random.standard_normal(base.shape))) for m in range(count)]
            got = merge(name, inputs, dtype=dtype, **given_values)
            assert got.shape == base.shape, edge
            assert np.isfinite(got).all(), edge
            same = merge(name, [inputs[0]] * count, dtype=dtype, **given_values)
            assert np.isfinite(same).all(), edge


@pytest.mark.parametrize("name", [n for n in METHODS if not isinstance(get_method(n).form, Whole)])
def test_blocks_and_ranges_do_not_matter(name, monkeypatch):
    from mergekit.execute import work

    method = get_method(name)
    random = np.random.default_rng(0)
    inputs = [random.standard_normal((257, 131)).astype(np.float32) for _ in range(counts(method)[0])]
    given_values = fixed(name, weight=0.5, density=0.5, t=0.3)
    monkeypatch.setattr(work, "RANGE", 1 << 13)
    one = merge(name, inputs, dtype=BF16, **given_values)
    assert np.array_equal(one, merge(name, inputs, dtype=BF16, block=4096, **given_values))
    assert np.array_equal(one, merge(name, inputs, dtype=BF16, block=12288, **given_values))
