"""nuslerp, multislerp, karcher and model_stock against float64 NumPy on the vectors themselves."""

from __future__ import annotations

import numpy as np
import pytest

import mergekit
import span_oracles as oracles
from engine import merge
from kernel_cases import BACK_ENDS, back_end, pack
from mergekit.dtypes import BF16, F16, F32
from mergekit.errors import RecipeError
from mergekit.execute import span_work, work
from mergekit.kernels import cpu
from mergekit.methods import get_method
from models import family, read_model

SHAPES = [(24, 40), (7, 129), (5, 1, 6), (3, 4, 5), (33,), (1,), (), (1, 9), (9, 1)]
KINDS = {
    "tensor": {"nuslerp_flatten": True},
    "rows": {"nuslerp_flatten": False},
    "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}


@pytest.fixture(params=BACK_ENDS)
def kernels(request):
    return back_end(request.param)


def models(shape: tuple[int, ...], count: int, delta: float = 0.5, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng([seed, *shape])
    base = random.standard_normal(shape)
    return [np.float32(base + (delta * random.standard_normal(shape) if m else 0)) for m in range(count)]


def close(got: np.ndarray, want: np.ndarray, inputs: list[np.ndarray]) -> None:
    """Within 1e-6 of the sum of the magnitudes that are added up."""
    scale = sum(abs(np.float64(x)).max(initial=0) for x in inputs)
    assert abs(got - want).max(initial=0) <= 1e-6 * max(scale, 1e-30)


def doubles(inputs: list[np.ndarray]) -> list[np.ndarray]:
    return [np.float64(x) for x in inputs]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_base", [True, False])
def test_nuslerp(kernels, shape, kind, has_base):
    inputs = models(shape, 2 + has_base)
    more = {"kernels": kernels, "has_base": has_base, "weight": (0.3, 0.9), **KINDS[kind]}
    base, *others = doubles(inputs) if has_base else [None, *doubles(inputs)]
    close(merge("nuslerp", inputs, **more), oracles.nuslerp(base, others, [0.3, 0.9], kind), inputs)


@pytest.mark.parametrize("weight", [(1.0, 0.0), (0.0, 1.0), (1.0, -1.0), (-0.5, 2.0)])
def test_nuslerp_weights(weight):
    inputs = models((12, 8), 3)
    want = oracles.nuslerp(*(lambda b, *o: (b, o))(*doubles(inputs)), list(weight))
    close(merge("nuslerp", inputs, has_base=True, weight=weight), want, [*inputs, *inputs, *inputs])


@pytest.mark.parametrize("kind", KINDS)
def test_nuslerp_of_opposed_and_of_equal_vectors_is_straight(kind):
    one = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
    for other in (one, -one, np.float32(-1.1) * one, np.float32(2) * one):
        got = merge("nuslerp", [one, other], weight=(1.0, 3.0), **KINDS[kind])
        np.testing.assert_allclose(got, 0.25 * np.float64(one) + 0.75 * np.float64(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp(shape, count, has_base, normalize):
    inputs, weight = models(shape, count + has_base), [0.4, 1.1, 0.2, 0.9][:count]
    base, *others = doubles(inputs) if has_base else [None, *doubles(inputs)]
    got = merge("multislerp", inputs, has_base=has_base, weight=tuple(weight), normalize_weights=normalize)
    close(got, oracles.multislerp(base, others, weight, normalize), [*inputs, *inputs])


def test_multislerp_of_models_that_cancel_is_their_sum():
    one = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
    got = merge("multislerp", [one, -one], weight=(1.0, 1.0))
    assert abs(got).max() <= 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("delta", [0.01, 0.5, 3.0])
def test_karcher(kernels, shape, count, delta):
    inputs = models(shape, count, delta)
    if len(shape) < 2:
        inputs = [np.abs(x) for x in inputs]  # numbers of both signs are opposite directions
    close(merge("karcher", inputs, kernels=kernels), oracles.karcher(doubles(inputs)), [*inputs, *inputs])


def test_karcher_ignores_the_direction_of_nothing():
    one, two = models((5, 7), 2)
    got = merge("karcher", [one, np.zeros_like(one), two])
    want = oracles.karcher(doubles([one, two])) * 2 / 3  # its length counts
    close(got, want, [one, two])
    assert not merge("karcher", [np.zeros_like(one)] * 2).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("filter_wise", [True, False])
def test_model_stock(kernels, shape, count, filter_wise):
    inputs = models(shape, count + 1)
    # What the models share: cosines that are well away from zero, where t would be noise.
    inputs[1:] = [x + np.float32(0.4) for x in inputs[1:]]
    base, *others = doubles(inputs)
    got = merge("model_stock", inputs, kernels=kernels, filter_wise=filter_wise)
    close(got, oracles.model_stock(base, others, "rows" if filter_wise else "tensor"), [*inputs, *inputs])


@pytest.mark.parametrize(("name", "more"), [
    ("nuslerp", {"weight": 0.5}), ("multislerp", {"weight": 0.5}), ("karcher", {}), ("slerp", {"t": 0.4}),
])  # fmt: skip
def test_deltas_of_a_ten_thousandth_keep_their_direction_between_weights(name, more):
    """Models near each other: the result moves along the mean of their differences."""
    base, one = models((300, 400), 2)
    other = (base + 1e-4 * (one - base)).astype(np.float32)
    t = 0.4 if name == "slerp" else 0.5
    got = merge(name, [base, other], **more) - base
    want = t * (np.float64(other) - base)
    assert (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want) > 1 - 1e-3


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_rows_and_columns_over_many_ranges(kernels, monkeypatch, kind, dtype):
    inputs = models((130, 257), 3)
    whole = merge("nuslerp", inputs, has_base=True, dtype=dtype, kernels=kernels, weight=0.5, **KINDS[kind])
    monkeypatch.setattr(work, "RANGE", 1 << 12)
    parts = [
        merge("nuslerp", inputs, has_base=True, dtype=dtype, kernels=kernels, weight=0.5, block=b, **KINDS[kind])
        for b in (4096, 8192)
    ]
    # Rows cut by a range are added up in two parts, which float64 holds nearly exactly.
    np.testing.assert_allclose(parts[0], whole, rtol=0, atol=2e-2 if dtype != F32 else 1e-6)
    if kernels is cpu:
        assert np.array_equal(parts[0], parts[1])


@pytest.mark.parametrize("base", [-1, 0])
@pytest.mark.parametrize(("shape", "start"), [((40, 100), 0), ((40, 100), 2048), ((3, 5000), 1024), ((5000, 3), 1024)])
def test_gram_kernels_by_vector(kernels, base, shape, start):
    inputs, size = models(shape, 3), 2048
    raw, codes = pack([x.reshape(-1)[start : start + size] for x in inputs], [F32] * 3)
    size = min(size, inputs[0].size - start)
    x = np.stack([np.float64(i).reshape(-1)[start : start + size] for i in inputs])
    x = x - x[base] if base >= 0 else x
    places = np.arange(start, start + size)
    rows, columns = places // shape[1], places % shape[1]
    by_row = np.zeros((shape[0], 3, 3))
    kernels.row_grams(raw, codes, base, shape[1], 0, start, size, by_row)
    by_column = np.zeros((3, 3, shape[1]))
    kernels.column_grams(raw, codes, base, shape[1], start, size, by_column)
    for a in range(3):
        for b in range(a, 3):
            want = np.bincount(rows, x[a] * x[b], shape[0])
            np.testing.assert_allclose(by_row[:, a, b], want, rtol=0, atol=1e-5 * max(abs(want).max(), 1))
            want = np.bincount(columns, x[a] * x[b], shape[1])
            np.testing.assert_allclose(by_column[a, b], want, rtol=0, atol=1e-5 * max(abs(want).max(), 1))


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
@pytest.mark.parametrize("has_base", [True, False])
def test_a_base_is_optional(tmp_path, method, has_base):
    shapes = {"model.layers.0.w": (12, 10), "norm": (10,)}
    folders = family(tmp_path, 3, F32, shapes)
    recipe = {"merge_method": method, "models": [{"model": str(f)} for f in folders[1:]], "parameters": {"weight": 0.5}}
    if has_base:
        recipe["base_model"] = str(folders[0])
    got = read_model(mergekit.run_merge(recipe, tmp_path / "out"))
    base, *others = map(read_model, folders)
    for name in shapes:
        oracle = getattr(oracles, method)
        close(
            got[name], oracle(base[name] if has_base else None, [o[name] for o in others], [0.5, 0.5]), [got[name]] * 3
        )


def test_a_base_among_the_models_is_the_base(tmp_path):
    folders = family(tmp_path, 3, F32, {"w": (12, 10)})
    recipe = {"merge_method": "nuslerp", "base_model": str(folders[0]), "parameters": {"weight": 0.5}}
    with_it = {**recipe, "models": [{"model": str(f)} for f in folders]}
    without = {**recipe, "models": [{"model": str(f)} for f in folders[1:]]}
    one, two = (read_model(mergekit.run_merge(r, tmp_path / n)) for r, n in ((with_it, "a"), (without, "b")))
    assert np.array_equal(one["w"], two["w"])


def test_model_stock_skips_what_too_few_models_have(tmp_path):
    shapes = {"w": (4, 5), "extra": (3,)}
    folders = family(tmp_path, 3, F32, {"w": (4, 5)})
    folders[1:2] = family(tmp_path / "more", 2, F32, shapes)[1:]
    folders[0] = family(tmp_path / "base", 1, F32, shapes)[0]
    recipe = {
        "merge_method": "model_stock",
        "base_model": str(folders[0]),
        "models": [{"model": str(f)} for f in folders[1:]],
    }
    plan = mergekit.plan(recipe)
    assert [o.name for o in plan.outputs] == ["w"]
    assert any("too few models have these tensors for 'model_stock'" in w and "extra" in w for w in plan.warnings)


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("karcher", {"max_iter": 0}, r"'max_iter': 0 is outside .*number in \[1, inf\]"),
        ("karcher", {"max_iter": 2.5}, "expected a whole number, got 2.5"),
        ("karcher", {"tol": -1}, r"-1 is outside number in \[0, inf\]"),
        ("karcher", {"tol": 0}, "tol is 0; it must be greater than 0"),
        ("multislerp", {"weight": 1, "eps": 0}, "eps is 0; it must be greater than 0"),
        ("nuslerp", {}, "'nuslerp' needs 'weight'"),
    ],
)
def test_impossible_parameters_are_refused(tmp_path, method, parameters, message):
    folders = family(tmp_path, 2, F32, {"w": (4, 5)})
    recipe = {"merge_method": method, "models": [{"model": str(f)} for f in folders], "parameters": parameters}
    with pytest.raises(RecipeError, match=message):
        mergekit.plan(recipe)


def test_weights_that_sum_to_zero_are_refused(tmp_path):
    folders = family(tmp_path, 2, F32, {"w": (4, 5)})
    models_ = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, (1, -1), strict=True)]
    with pytest.raises(RecipeError, match="the weights sum to zero"):
        mergekit.plan({"merge_method": "multislerp", "models": models_})


def test_two_models_for_nuslerp(tmp_path):
    folders = family(tmp_path, 4, F32, {"w": (4, 5)})
    recipe = {
        "merge_method": "nuslerp",
        "models": [{"model": str(f)} for f in folders[:3]],
        "parameters": {"weight": 1},
    }
    with pytest.raises(RecipeError, match=r"'nuslerp' takes 2 model\(s\) besides the base, but this gives 3"):
        mergekit.plan(recipe)


def test_memory_of_rows_and_columns_is_declared():
    from mergekit.execute.span_work import SpanWork
    from mergekit.planning.expression import Apply

    for kind, more in KINDS.items():
        values = {"weight": (1.0, 1.0), "nuslerp_row_wise": False, **more}
        held = SpanWork.held(Apply("nuslerp", (None, None), (0, 1), False, tuple(values.items())), (1000, 200), 2)
        vectors = {"tensor": 0, "rows": 1000, "columns": 200}[kind]
        assert (held == 0) if not vectors else held >= vectors * 2 * 2 * 8
    assert get_method("nuslerp").form.vectors is not None


@pytest.mark.parametrize("has_base", [True, False])
def test_a_single_model_is_returned_bit_for_bit(kernels, has_base):
    inputs = [np.float32([1.0, 3e7, -0.0, 1e-30]), np.float32([1.1, 0.1, -0.0, 1e-38])][1 - has_base :]
    got = merge("multislerp", inputs, has_base=has_base, kernels=kernels, weight=0.3)
    assert np.array_equal(got.astype(np.float32).view(np.uint32), inputs[-1].view(np.uint32))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_no_length_is_too_great_or_small(scale):
    """float32 can't hold the square of such a number; coefficients don't depend on a common factor."""
    shape = (6, 50)
    random = np.random.default_rng(0)
    common = random.standard_normal(shape)
    inputs = [np.float32(common + 0.5 * random.standard_normal(shape)) for _ in range(4)]
    inputs[0] = np.float32(inputs[0] * 0.1)
    large = [np.float32(scale) * x for x in inputs]
    for name, count, more in [
        ("slerp", 2, {"t": 0.3}), ("karcher", 4, {}), ("model_stock", 4, {}), ("model_stock", 4, {"filter_wise": True}),
        ("nuslerp", 2, {"weight": 0.5, **KINDS["rows"]}), ("nuslerp", 2, {"weight": 0.5, **KINDS["columns"]}),
        ("multislerp", 3, {"weight": 0.5, "eps": 1e-60}),
    ]:  # fmt: skip
        if name == "slerp" and scale < 1:
            continue  # it counts what is shorter than 1e-8 as orthogonal
        want = merge(name, inputs[:count], **more) * scale
        got = merge(name, large[:count], **more)
        assert abs(got - want).max() <= 2e-6 * abs(want).max(), name


@pytest.mark.parametrize("delta", [1e-3, 1e-4])
def test_three_models_near_each_other_have_their_mean(delta):
    """All angles are tiny: where cosines were taken in float32 one of the models would be left out."""
    random = np.random.default_rng(1)
    base = random.standard_normal((300, 400))
    inputs = [np.float32(base + delta * size * random.standard_normal(base.shape)) for size in (1.0, 0.3, 2.0)]
    held = doubles(inputs)
    want = sum(x - held[0] for x in held) / 3
    for name, more in (("karcher", {}), ("multislerp", {"weight": 1.0})):
        got = merge(name, inputs, **more) - held[0]
        # The mean length is a little more than that of the mean.
        assert (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want) > 1 - 1e-3, name
        assert abs(np.linalg.norm(got) / np.linalg.norm(want) - 1) < 0.01, name


@pytest.mark.parametrize("kind", KINDS)
def test_task_vectors_of_a_ten_thousandth_keep_their_direction(kind):
    random = np.random.default_rng(2)
    base = random.standard_normal((90, 110)).astype(np.float32)
    common = random.standard_normal(base.shape)
    models_ = [np.float32(base + 1e-4 * (common + 0.5 * random.standard_normal(base.shape))) for _ in range(2)]
    exact, others = np.float64(base), doubles(models_)
    for name, want, more in (
        ("nuslerp", oracles.nuslerp(exact, others, [0.3, 0.9], kind), {"weight": (0.3, 0.9), **KINDS[kind]}),
        ("model_stock", oracles.model_stock(exact, others, kind), {"filter_wise": kind == "rows"}),
        ("multislerp", oracles.multislerp(exact, others, [0.3, 0.9]), {"weight": (0.3, 0.9)}),
    ):
        if kind == "columns" and name == "model_stock":
            continue
        got = merge(name, [base, *models_], has_base=True, **more) - exact
        want = want - exact
        assert (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want) > 1 - 1e-3, name
        assert abs(np.linalg.norm(got) / np.linalg.norm(want) - 1) < 1e-3, name


@pytest.mark.parametrize("filter_wise", [True, False])
def test_lines_scales_the_merged_delta(filter_wise):
    inputs = [np.round(x * 8) / 8 for x in models((30, 20), 4)]
    one = merge("model_stock", inputs, filter_wise=filter_wise) - inputs[0]
    half = merge("model_stock", inputs, filter_wise=filter_wise, scale=0.5) - inputs[0]
    np.testing.assert_allclose(half, 0.5 * one, rtol=0, atol=1e-6)
    assert abs(one).max() > 0.01


def test_karcher_of_opposite_models_is_the_first_direction():
    one = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
    got = merge("karcher", [one, np.float32(-3) * one])
    np.testing.assert_allclose(got, 2 * np.float64(one), rtol=1e-6)


def test_model_stock_at_its_singularity_is_the_base():
    base = np.ones((3, 4), np.float32)
    inputs = [base, base + np.float32(0.25), base - np.float32(0.25)]
    for filter_wise in (True, False):
        assert np.array_equal(merge("model_stock", inputs, filter_wise=filter_wise), base)


@pytest.mark.parametrize("kind", ["tensor", "rows"])
def test_nuslerp_of_nearly_opposite_vectors_is_not_chosen_by_rounding(kind):
    """Along the great circle the result would be a thousand times as long as it should, in a direction of noise."""
    random = np.random.default_rng(0)
    one = random.standard_normal((6, 500))
    other = -one + 1e-4 * random.standard_normal(one.shape)
    got = merge("nuslerp", [np.float32(one), np.float32(other)], weight=(1.0, 3.0), **KINDS[kind])
    np.testing.assert_allclose(got, 0.25 * one + 0.75 * other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_how_many_vectors_are_solved_at_once_does_not_matter(monkeypatch, kind):
    inputs = models((20, 30), 3)
    whole = merge("nuslerp", inputs, has_base=True, weight=0.5, **KINDS[kind])
    monkeypatch.setattr(span_work, "_CHUNK", 7)
    assert np.array_equal(whole, merge("nuslerp", inputs, has_base=True, weight=0.5, **KINDS[kind]))
