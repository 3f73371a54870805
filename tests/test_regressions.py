"""Faults that reviews found in merge methods, and that must not come back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mergekit
from command import assert_refused, mergekit_yaml
from files import read_model, write_model, write_recipe, write_safetensors
from mergekit.methods import GroupTop, KeepAll, MagnitudeBand, Sparse, SparseMerge, Whole, each, method
from mergekit.methods.kinds import Real
from mergekit.methods.spec import REGISTRY


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def deltas(*values: list[float]) -> list[np.ndarray]:
    return [np.zeros(len(values[0]), np.float32), *(np.array(v, np.float32) for v in values)]


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "breadcrumbs"])
@pytest.mark.parametrize("rescale", ["l1", "none"])
def test_a_number_that_is_not_finite_shows_though_its_entry_is_dropped(name, rescale):
    """With L1 norms to restore, there is none: the result must not look sound."""
    random = np.random.default_rng(1)
    x = deltas(list(random.standard_normal(500)))
    x[1][7] = np.nan
    options = {"weight": 1, "density": 0.3, "rescale": rescale, **({"gamma": 0.1} if name == "breadcrumbs" else {})}
    found = mergekit.merge_tensors(x, name, options, base_index=0)
    assert np.isfinite(found).all() == (rescale == "none" and not np.isnan(found).any())
    if rescale == "l1":
        assert np.isnan(found).any()


def test_a_model_with_nan_stops_the_merge_of_files():
    for name, seed in (("a", 0), ("b", 1)):
        write_model(Path(name), seed, code="F32")
    tensors = read_model(Path("b"))
    code, values = tensors["model.layers.0.mlp.up_proj.weight"]
    values = values.copy()
    values[3, 3] = np.nan
    write_safetensors(Path("b/model.safetensors"), {**tensors, "model.layers.0.mlp.up_proj.weight": (code, values)})
    write_recipe(
        Path("r.yml"),
        "merge_method: dare_linear\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1, density: 0.1}}]",
    )
    assert_refused(mergekit_yaml("r.yml", "out"), 1, "model.layers.0.mlp.up_proj.weight", "NaN")
    assert mergekit_yaml("r.yml", "out", "--allow-nonfinite").code == 0
    record = json.loads(Path("out/merge_stats.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    figures = record["tensors"]["model.layers.0.mlp.up_proj.weight"]
    assert figures["deltas"] == [None]
    assert figures["survival"] is None
    assert record["summary"]["survival"] is None


@pytest.mark.parametrize("name", ["ties", "dare_ties", "della"])
def test_nan_shows_with_gradients_as_without(name):
    import torch

    x = [torch.zeros(64), torch.randn(64, generator=torch.Generator().manual_seed(0)), torch.ones(64)]
    x[1][5] = float("nan")
    options = {"weight": 1.0, **({"epsilon": 0.1, "density": 0.5} if name == "della" else {})}
    plain = mergekit.merge_tensors(x, name, options, base_index=0)
    x[1].requires_grad_()
    with_gradients = mergekit.merge_tensors(x, name, options, base_index=0)
    assert torch.isnan(with_gradients).sum() >= torch.isnan(plain).sum() >= 1


def test_calibration_keeps_lambda_and_leaves_out_models_without_weight():
    random = np.random.default_rng(2)
    x = [np.zeros((9, 7), np.float32), *(random.standard_normal((2, 9, 7)).astype(np.float32))]

    def merged(**options: object) -> np.ndarray:
        return mergekit.merge_tensors(x, "task_arithmetic", {"weight": 1.0, "svc": 0.5, **options}, base_index=0)

    np.testing.assert_allclose(merged(**{"lambda": 3.0}), 3 * merged(), rtol=1e-5)
    alone = mergekit.merge_tensors(x[:2], "task_arithmetic", {"weight": 1.0, "svc": 0.5}, base_index=0)
    np.testing.assert_allclose(merged(weight=[1.0, 0.0]), alone, rtol=1e-5)


def test_equal_vectors_however_short():
    x = np.array([1e-9, 0.0], np.float32)
    assert np.array_equal(mergekit.merge_tensors([x, x], "slerp", {"t": 0.5}, base_index=0), x)
    zero = np.zeros(2, np.float32)
    found = mergekit.merge_tensors([zero, np.ones(2, np.float32)], "multislerp", {"weight": 1, "eps": 1e-40})
    assert np.isfinite(found).all()


FAULTY = {
    "gamma": SparseMerge((MagnitudeBand(0.5, float("nan")),), (1.0,), False, False, "none", 1.0),
    "negative gamma": SparseMerge((MagnitudeBand(0.5, -0.1),), (1.0,), False, False, "none", 1.0),
    "elect": SparseMerge((KeepAll(),), (1.0,), True, False, "none", 1.0, elect="foo"),
    "groups": SparseMerge((GroupTop(-3, -2),), (1.0,), False, False, "none", 1.0),
    "half a group": SparseMerge((GroupTop(1.5, 4),), (1.0,), False, False, "none", 1.0),  # type: ignore[arg-type]
    "consensus": SparseMerge((KeepAll(),), (1.0,), "no", False, "none", 1.0),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("fault", FAULTY)
def test_sparse_merges_of_others_are_held_to_their_words(fault):
    @method("mine", form=Sparse(), base="required", params=[])
    def mine() -> SparseMerge:
        return FAULTY[fault]

    with pytest.raises(mergekit.MergekitError, match=r"'mine'.*must return a SparseMerge"):
        mergekit.merge_tensors(deltas([1.0, 2.0]), "mine", base_index=0)


def test_late_faults_of_others_are_one_line():
    from mergekit.methods import ParameterError

    @method("late", form=Whole(), base="required", params=[each("weight", Real(), help="w")])
    def late(x: list[object], *, weight: tuple[float, ...]) -> object:
        raise ParameterError("too late")

    with pytest.raises(mergekit.MergekitError, match=r"'late' on tensor .*too late"):
        mergekit.merge_tensors(deltas([1.0, 2.0]), "late", {"weight": 1}, base_index=0)
    with pytest.raises(mergekit.MergekitError, match="no name"):
        method(None, form=Whole(), base="required", params=[])(late)  # type: ignore[arg-type]


def test_density_of_groups_is_the_share_that_is_left_to_them():
    @method("shares", form=Sparse(), base="required", params=[])
    def shares() -> SparseMerge:
        return SparseMerge((GroupTop(3, 4), GroupTop(2, 4)), (0.0, 1.0), False, False, "density", 1.0)

    x = deltas([4.0, 3.0, 2.0, 1.0] * 8, [1.0] * 32)
    found = mergekit.merge_tensors(x, "shares", base_index=0)
    assert sorted(np.unique(found).tolist()) == [0.0, 4.0], "one of four is open, so it counts four times"


def test_a_density_beyond_its_range_is_told():
    for name, seed in (("a", 0), ("b", 1)):
        write_model(Path(name), seed)
    write_recipe(
        Path("r.yml"), "merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1, density: 50}}]"
    )
    result = mergekit_yaml("r.yml", "out")
    assert result.code == 0
    assert "'density' is 50, but is meant to lie in [0, 1]" in result.err
