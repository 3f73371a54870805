"""The elementwise form (selection, sums, chunks) and its methods against plain float64 NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import elementwise_oracles as oracles
import mergekit
from engine import merge
from kernel_cases import BACK_ENDS, back_end
from mergekit.dtypes import BF16, F16, F32, DType
from mergekit.errors import IncompatibleError, NonFiniteError, RecipeError, UsageError
from mergekit.execute import work
from mergekit.kernels.elementwise import CHUNK
from mergekit.methods import Elementwise, ParameterError, Real, get_method, method, once
from mergekit.methods.spec import REGISTRY
from models import decode, encode, family, read_model, write_model
from test_oracles import assert_close

SHAPES = [(3, 7), (1031, 5), (2, 521, 3), (), (1,), (5, 1, 3), (0, 4)]
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
METHODS = {"nearswap": {"t": 0.02}, "sce": {"select_topk": 0.4}, "ram": {}, "ramplus_tl": {}}
ORACLES = {"sce": oracles.sce, "ram": oracles.ram, "ramplus_tl": oracles.ramplus}


def models_of(
    shape: tuple[int, ...], count: int, dtype: DType = F32, delta: float = 0.1, sparse: float = 0.5, seed: int = 0
) -> list[np.ndarray]:
    """A base and fine-tunes of it as stored, float64; a share of each fine-tune's entries is left unchanged."""
    random = np.random.default_rng([seed, count, *shape])
    base = random.standard_normal(shape)
    tuned = [base + delta * random.standard_normal(shape) * (random.random(shape) > sparse) for _ in range(count - 1)]
    return [decode(encode(np.float32(m), dtype), dtype, shape) for m in (base, *tuned)]


def check(got: np.ndarray, want: np.ndarray, inputs: list[np.ndarray], dtype: DType) -> None:
    if want.size:
        assert_close({"t": got}, {"t": want}, {"t": sum(abs(x) for x in inputs) + 1e-3}, dtype)
    assert got.shape == want.shape


@DTYPES
@pytest.mark.parametrize("t", [0.0, 1e-7, 0.01, 0.3, -1.0])
def test_nearswap(dtype, t):
    for shape in SHAPES:
        base, other = models_of(shape, 2, dtype)
        check(
            merge("nearswap", [base, other], dtype=dtype, t=t), oracles.nearswap(base, other, t), [base, other], dtype
        )


@pytest.mark.parametrize("t", [1e-7, 1e-6, 3e-6])
def test_nearswap_below_its_floor(t):
    base = np.zeros(1001)
    other = np.linspace(-5e-6, 5e-6, 1001).astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(
        merge("nearswap", [base, other], t=t), oracles.nearswap(base, other, t), rtol=1e-6, atol=1e-14
    )


@DTYPES
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("topk", [1.0, 0.37, 0.0, -1.0, 2.0])
def test_sce(dtype, count, topk):
    for shape in SHAPES:
        inputs = models_of(shape, count, dtype)
        want = oracles.sce(inputs[0], inputs[1:], topk)
        check(merge("sce", inputs, dtype=dtype, select_topk=topk), want, inputs, dtype)


@DTYPES
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("epsilon", [1e-5, 0.05, 0.0])
def test_ram(dtype, count, epsilon):
    for shape in SHAPES:
        inputs = models_of(shape, count, dtype)
        want = oracles.ram(inputs[0], inputs[1:], epsilon)
        check(merge("ram", inputs, dtype=dtype, epsilon=epsilon), want, inputs, dtype)


@DTYPES
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (2.0, 10.0), (0.0, 0.2), (1.0, -0.5)])
def test_ramplus(dtype, count, r, alpha):
    for shape in SHAPES:
        inputs = models_of(shape, count, dtype, sparse=0.8)
        want = oracles.ramplus(inputs[0], inputs[1:], 1e-5, r, alpha if alpha > 0 else 0)
        check(merge("ramplus_tl", inputs, dtype=dtype, r=r, alpha=alpha), want, [3 * x for x in inputs], dtype)


def test_ramplus_amplifies_what_one_model_alone_changed():
    """Of a's changes three are shared and one is its own: the ratio 3 is capped at 2, so lambda is 1 + 0.5 * 2."""
    a, b = np.array([1.0, 1, 1, 1, 0, 0]), np.array([1.0, 1, 1, 0, 4, 4])
    got = merge("ramplus_tl", [np.zeros(6), a, b], r=0.5, alpha=2.0)
    assert got.tolist() == [1, 1, 1, 2, 4 * 1.75, 4 * 1.75]


def test_sce_weights_are_relative():
    """Deltas a thousandth the size give a change a thousandth the size; an absolute guard made the weights uniform."""
    inputs = models_of((50, 40), 4, delta=1.0)
    deltas = [np.float32(x - inputs[0]) for x in inputs[1:]]
    deltas[0] *= 3
    zero = np.zeros_like(deltas[0])
    large = merge("sce", [zero, *deltas])
    for scale in (2.0**-10, 2.0**-30):
        np.testing.assert_allclose(merge("sce", [zero, *(d * np.float32(scale) for d in deltas)]), large * scale, 1e-5)


def test_sce_of_models_that_agree_selects_nothing():
    """Three equal numbers have a variance of zero, exactly; of one model alone there is none."""
    base = np.float32(np.random.default_rng(1).standard_normal(999))
    tuned = base + np.float32(0.1)
    for count in (1, 2, 3):
        assert (merge("sce", [base] + [tuned] * count, select_topk=0.99) == base).all()
        assert abs(merge("sce", [base] + [tuned] * count) - tuned).max() < 1e-6


def test_sce_selects_as_many_as_float32_says():
    """The count is the one that torch finds for count_nonzero(variance) * select_topk."""
    keep = get_method("sce").form.keep  # type: ignore[union-attr]
    for nonzero in (0, 1, 10, 99, 1000, 2**24 + 1, 3 * 10**8 + 7):
        for topk in (0.1, 0.3, 0.7, 0.999):
            assert keep(nonzero, 10**9, select_topk=topk) == min(nonzero, int(torch.tensor(nonzero) * topk))


# ---- the form itself -------------------------------------------------------------------------------------------------


def key(xp, x, *, share):
    return xp.abs(x[0]) + xp.abs(x[1])


def keep(nonzero, size, *, share):
    return None if share > 1 else int(nonzero * share)


def measure(xp, x, *, share):
    return xp.stack([xp.sum(x[0] * x[0]), xp.sum(x[1])])


def contrast(xp, x, sums, *, share):
    """x0 - x1 * (sum x0^2 / (1 + |sum x1|))."""
    return x[0] - x[1] * float(sums[0] / (1 + abs(sums[1])))


def product(xp, x, *, share):
    """The product of two tensors, without selection or sums."""
    return x[0] * x[1]


def first(xp, x, *, share):
    """What is selected of the first tensor."""
    return x[0]


@pytest.fixture
def made_up():
    """Methods of this form that do it all, in both spaces, and one that does the least."""
    params = [once("share", Real(), 0.25, help="fraction kept")]
    forms = {
        "made_up_deltas": Elementwise("deltas", measure, key, keep),
        "made_up_weights": Elementwise("weights", measure, key, keep),
    }
    for name, form in forms.items():
        method(name, form=form, base="required" if form.space == "deltas" else "ignored", params=params)(contrast)
    method("made_up_product", form=Elementwise("weights"), base="ignored", params=params)(product)
    method("made_up_first", form=Elementwise("weights", None, key, keep), base="ignored", params=params)(first)
    yield
    for name in (*forms, "made_up_product", "made_up_first"):
        del REGISTRY[name]


def reference(x: list[np.ndarray], share: float) -> np.ndarray:
    """What ``contrast`` gives, on dyadic fractions that leave nothing to rounding but the sums."""
    if share <= 1:
        keys = (abs(x[0]) + abs(x[1])).reshape(-1)
        order = np.lexsort((np.arange(keys.size), -keys))
        mask = np.zeros(keys.size, bool)
        mask[order[: int(np.count_nonzero(keys) * share)]] = True
        x = [v * mask.reshape(v.shape) for v in x]
    return x[0] - x[1] * ((x[0] ** 2).sum() / (1 + abs(x[1].sum())))


def dyadic(size: int, seed: int) -> np.ndarray:
    """Multiples of 1/64, few of them different: most of the largest keys are ties."""
    return np.random.default_rng(seed).integers(-6, 7, size) / 64


@pytest.mark.parametrize("kind", BACK_ENDS)
@pytest.mark.parametrize("share", [0.25, 0.9, 0.0, 1.0, 2.0, 1e-4])
@pytest.mark.parametrize("size", [1, 1000, CHUNK, 3 * CHUNK + 17])
def test_selection_and_sums(made_up, monkeypatch, kind, share, size):
    monkeypatch.setattr(work, "RANGE", CHUNK)
    base, x = dyadic(size, 0), [dyadic(size, 1), dyadic(size, 2)]
    kernels = back_end(kind)
    want = reference(x, share)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * (1 + abs(want).max())}
    got = merge("made_up_weights", x, has_base=False, kernels=kernels, share=share)
    np.testing.assert_allclose(got, want, **tolerance)
    got = merge("made_up_deltas", [base, *(base + v for v in x)], kernels=kernels, share=share, scale=0.5)
    np.testing.assert_allclose(got, base + 0.5 * want, **tolerance)


def test_all_keys_equal(made_up):
    """Everything is a tie: the first are kept."""
    size = CHUNK + 100
    x = [np.full(size, 0.5), np.zeros(size)]
    got = merge("made_up_weights", x, has_base=False, share=0.75)
    assert (got == 0.5 * (np.arange(size) < size * 3 // 4)).all()


def test_keys_of_all_magnitudes(made_up):
    """Subnormal, tiny and huge keys are ranked rightly."""
    x = np.float32([0, 1e-45, 3e-45, 1e-39, 1e-20, 1e-20 * (1 + 2e-7), 1, 1e20, 3e38, -0.0])
    for share in np.arange(0, 9) / 8:
        kept = merge("made_up_first", [x, np.zeros(10)], has_base=False, share=float(share))
        want = np.where(np.arange(10) >= 9 - int(8 * share), x, 0)
        assert (kept == want).all()


def test_least_form(made_up):
    x = [dyadic(CHUNK + 3, 1), dyadic(CHUNK + 3, 2)]
    assert (merge("made_up_product", x, has_base=False) == x[0] * x[1]).all()


@pytest.mark.parametrize("name", METHODS)
def test_back_ends_are_the_same(name, monkeypatch):
    monkeypatch.setattr(work, "RANGE", CHUNK)
    inputs = models_of((3, 15013), 2 if name == "nearswap" else 4, BF16)
    one, two = (merge(name, inputs, dtype=BF16, kernels=back_end(kind), **METHODS[name]) for kind in BACK_ENDS[:2])
    assert (one == two).mean() > (0.9999 if name == "sce" else 1 - 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_blocks_do_not_matter(name, monkeypatch):
    monkeypatch.setattr(work, "RANGE", 4 * CHUNK)
    inputs = models_of((5, 50021), 2 if name == "nearswap" else 3, BF16)
    one = merge(name, inputs, dtype=BF16, block=CHUNK, **METHODS[name])
    for block in (2 * CHUNK, 3 * CHUNK, 1 << 20):
        assert (merge(name, inputs, dtype=BF16, block=block, **METHODS[name]) == one).all()


def recipe_of(name: str, folders: list[Path], **more: object) -> dict:
    models = [{"model": str(f)} for f in folders]
    return {"merge_method": name, "models": models, "base_model": str(folders[0]),
            "parameters": METHODS[name], **more}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_threads_and_statistics_do_not_matter(name, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "RANGE", CHUNK)
    folders = family(tmp_path, 2 if name == "nearswap" else 4, BF16, {"w": (331, 401), "norm": (17,), "one": ()})
    files = []
    for threads, statistics in ((1, True), (4, True), (3, False)):
        out = mergekit.run_merge(
            recipe_of(name, folders), tmp_path / f"{threads}", threads=threads, statistics=statistics
        )
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]
    plan = mergekit.plan(recipe_of(name, folders))
    assert {o.dtype for o in plan.outputs} == {BF16}
    base, *others = (read_model(f)["w"] for f in folders)
    want = (
        oracles.nearswap(base, others[0], 0.02)
        if name == "nearswap"
        else ORACLES[name](base, others, *METHODS[name].values())
    )
    got = read_model(tmp_path / "1")["w"]
    if name == "sce":  # where variances are nearly equal, float32 may rank two of a hundred thousand differently
        near = abs(got - want) <= 2.0**-8 * abs(want) + 2e-5
        got, want = np.where(near, got, want), want
        assert near.mean() > 0.9999
    check(got, want, [base, *others], BF16)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_shows(name, value, place):
    inputs = models_of((40, 40), 2 if name == "nearswap" else 4)
    inputs[place] = inputs[place].copy()
    inputs[place][7, 9] = value
    if name == "nearswap" and place == 1 and np.isinf(value):
        step = merge(name, inputs, **METHODS[name])[7, 9] - inputs[0][7, 9]
        assert step == pytest.approx(np.sign(value) * 0.02, rel=1e-4)  # a step towards it, however far it is
        return
    with pytest.raises(NonFiniteError, match="tensor t"):
        merge(name, inputs, **METHODS[name])


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_what_only_the_base_has_is_passed(tmp_path):
    w, head = np.ones((4, 4)), np.full((4, 4), 2.0)
    base = write_model(tmp_path / "base", {"w": w, "head.weight": head})
    other = write_model(tmp_path / "other", {"w": w + 0.5})
    for name in METHODS:
        got = read_model(mergekit.run_merge(recipe_of(name, [base, other]), tmp_path / name))
        assert (got["head.weight"] == head).all()


def test_nearswap_refuses_what_the_base_lacks(tmp_path):
    w = np.ones((4, 4))
    base, other = write_model(tmp_path / "base", {"w": w}), write_model(tmp_path / "other", {"w": w, "head.weight": w})
    with pytest.raises(IncompatibleError, match=r"head\.weight"):
        mergekit.plan(recipe_of("nearswap", [base, other]))


def test_a_base_alone_is_a_copy(tmp_path):
    (base,) = family(tmp_path, 1)
    for name in ("sce", "ram", "ramplus_tl"):
        got = read_model(mergekit.run_merge(recipe_of(name, [base]), tmp_path / name))
        assert all((got[n] == v).all() for n, v in read_model(base).items())


@pytest.mark.parametrize(
    ("name", "count", "parameters", "message"),
    [
        ("nearswap", 2, {}, "needs 't'"),
        ("nearswap", 3, {"t": 0.1}, "nearswap"),
        ("nearswap", 1, {"t": 0.1}, "nearswap"),
        ("nearswap", 2, {"t": "near"}, "expected a number"),
        ("sce", 3, {"select_topk": float("nan")}, "finite"),
        ("sce", 3, {"topk": 0.1}, "topk"),
        ("ram", 3, {"epsilon": -1e-5}, "outside"),
        ("ramplus_tl", 3, {"alpha": [0.1, "x"]}, "expected a number"),
    ],
)
def test_bad_recipes(tmp_path, name, count, parameters, message):
    folders = family(tmp_path, count)
    with pytest.raises((RecipeError, UsageError, ParameterError), match=message):
        mergekit.plan({**recipe_of(name, folders), "parameters": parameters})


def test_old_recipes_carry_int8_mask(tmp_path):
    folders = family(tmp_path, 3)
    recipe = recipe_of("sce", folders)
    recipe["parameters"] = {"select_topk": 0.4, "int8_mask": True}
    one = mergekit.run_merge(recipe, tmp_path / "one")
    two = mergekit.run_merge(recipe_of("sce", folders), tmp_path / "two")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
