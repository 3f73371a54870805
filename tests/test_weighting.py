"""Automatic weights: shares of lengths over whole models, multiplied into the weights before the run."""

from __future__ import annotations

import numpy as np
import pytest

import mergekit
from mergekit.dtypes import BF16, F32
from mergekit.errors import RecipeError
from models import family, read_model

SHAPES = {"layers.0.w": (31, 40), "layers.1.w": (31, 40), "norm": (40,)}


def recipe(folders, weighting: str, method: str = "task_arithmetic", weight: object = 1.0, **parameters) -> dict:
    return {
        "merge_method": method,
        "base_model": str(folders[0]),
        "models": [{"model": str(f)} for f in folders[1:]],
        "parameters": {"weight": weight, "weighting": weighting, **parameters},
    }


def shares(folders, weighting: str) -> list[float]:
    base, *others = map(read_model, folders)
    squares = [sum(((o[n] - (base[n] if weighting == "metagpt" else 0)) ** 2).sum() for n in SHAPES) for o in others]
    parts = squares if weighting == "metagpt" else [s**-0.5 for s in squares]
    return [p / sum(parts) for p in parts]


@pytest.mark.parametrize("weighting", ["nan", "metagpt"])
@pytest.mark.parametrize("threads", [1, 3])
def test_weights_are_shares_over_the_whole_model(tmp_path, weighting, threads):
    folders = family(tmp_path, 4, F32, SHAPES)
    base, *others = map(read_model, folders)
    got = read_model(mergekit.run_merge(recipe(folders, weighting, weight=0.5), tmp_path / "out", threads=threads))
    for name in SHAPES:
        want = base[name] + 0.5 * sum(
            s * (o[name] - base[name]) for s, o in zip(shares(folders, weighting), others, strict=True)
        )
        np.testing.assert_allclose(got[name], want, rtol=0, atol=2e-6)


def test_given_weights_in_their_place_make_the_same_bytes(tmp_path):
    folders = family(tmp_path, 3, BF16, SHAPES)
    auto = mergekit.run_merge(recipe(folders, "metagpt", "ties", density=0.5), tmp_path / "auto")
    by_hand = recipe(folders, "none", "ties", density=0.5)
    for model, share in zip(by_hand["models"], shares(folders, "metagpt"), strict=True):
        model["parameters"] = {"weight": share}
    mergekit.run_merge(by_hand, tmp_path / "hand")
    a, b = read_model(auto), read_model(tmp_path / "hand")
    assert all(np.mean(a[n] == b[n]) > 0.99 for n in SHAPES)


def test_weighting_by_filter_leaves_the_rest(tmp_path):
    folders = family(tmp_path, 3, F32, SHAPES)
    only = [{"filter": "layers.0", "value": "metagpt"}, {"value": "none"}]
    got = read_model(mergekit.run_merge(recipe(folders, only, weight=0.25), tmp_path / "out"))
    base, *others = map(read_model, folders)
    want = base["norm"] + 0.25 * sum(o["norm"] - base["norm"] for o in others)
    np.testing.assert_allclose(got["norm"], want, rtol=0, atol=2e-6)


def test_models_equal_to_the_base_share_equally(tmp_path):
    (folder,) = family(tmp_path, 1, F32, SHAPES)
    copies = [folder, *(tmp_path / f"copy{i}" for i in range(2))]
    for copy in copies[1:]:
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    got = read_model(mergekit.run_merge(recipe(copies, "metagpt"), tmp_path / "out"))
    assert all(np.array_equal(got[n], read_model(folder)[n]) for n in SHAPES)


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    from mergekit.output.staging import Staging

    folders = family(tmp_path, 3, BF16, SHAPES)
    whole = mergekit.run_merge(recipe(folders, "nan"), tmp_path / "whole")
    finish = Staging.finish

    def stop(self, *rest):
        finish(self, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            mergekit.run_merge(recipe(folders, "nan"), tmp_path / "out", threads=1)
    out = mergekit.run_merge(recipe(folders, "nan"), tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.2, 1.0)])
def test_lines_scales_the_merged_delta_by_depth(tmp_path, alpha, beta):
    shapes = {"embed.weight": (5, 8), **{f"model.layers.{i}.w": (8, 8) for i in range(5)}, "norm": (8,)}
    folders = family(tmp_path, 3, F32, shapes)
    plain = read_model(mergekit.run_merge(recipe(folders, "none", "ties", density=0.6), tmp_path / "plain"))
    scaled = recipe(folders, "none", "ties", density=0.6, lines_alpha=alpha, lines_beta=beta)
    got, base = read_model(mergekit.run_merge(scaled, tmp_path / "out")), read_model(folders[0])
    for name in shapes:
        layer = int(name.split(".")[2]) if "layers" in name else 0
        want = base[name] + (alpha + beta * layer / 4) * (plain[name] - base[name])
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-6)


def test_unknown_weightings_and_methods_without_weights_are_told(tmp_path):
    folders = family(tmp_path, 2, F32, SHAPES)
    with pytest.raises(RecipeError, match=r"'metagtp' is none of its values. Did you mean 'metagpt'"):
        mergekit.plan(recipe(folders, "metagtp"))
    plan = mergekit.plan({**recipe(folders, "nan", "slerp"), "parameters": {"t": 0.5, "weighting": "nan"}})
    assert any("'slerp' has no parameter 'weighting'" in warning for warning in plan.warnings)


def test_lengths_of_nothing_finite_are_refused(tmp_path):
    from mergekit.errors import NonFiniteError
    from models import write_model

    folders = family(tmp_path, 2, F32, SHAPES)
    bad = {n: np.float32(x) for n, x in read_model(folders[1]).items()}
    bad["layers.1.w"][3, 4] = np.inf
    with pytest.raises(NonFiniteError, match=r"tensor layers\.1\.w of some model holds NaN or infinity"):
        mergekit.run_merge(recipe([folders[0], write_model(tmp_path / "bad", bad)], "metagpt"), tmp_path / "out")


def test_lines_counts_layers_of_the_output_across_slices(tmp_path):
    shapes = {"embed.weight": (5, 8), **{f"model.layers.{i}.w": (8, 8) for i in range(4)}, "norm": (8,)}
    folders = family(tmp_path, 2, F32, shapes)
    slices = [{"sources": [{"model": str(f), "layer_range": part} for f in folders]} for part in ([0, 2], [2, 4])]
    merge = {"merge_method": "task_arithmetic", "base_model": str(folders[0]), "slices": slices}
    parameters = {"weight": 1.0, "lines_alpha": 0.25, "lines_beta": 0.75}
    got = read_model(mergekit.run_merge({**merge, "parameters": parameters}, tmp_path / "out"))
    base, other = map(read_model, folders)
    for i in range(4):
        name = f"model.layers.{i}.w"
        want = base[name] + (0.25 + 0.75 * i / 3) * (other[name] - base[name])
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-6)
