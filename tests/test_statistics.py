"""merge_stats.json: figures against plain NumPy, of whole tensors and of the sample; what resuming makes of them."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import mergekit
from mergekit.dtypes import BF16, F16, F32
from models import decode, encode, family, read_model, write_model

SMALL = {"layers.0.w": (64, 33), "norm": (33,)}
LARGE = {"w": (1024, 1031)}  # over a million elements: sampled


def merged(tmp_path: Path, method: str, folders: list[Path], out: str = "out", **more) -> tuple[dict, dict]:
    """The statistics and the tensors of a merge of ``folders``, the first of which is the base."""
    base = {} if method == "linear" else {"base_model": str(folders[0])}
    models = [{"model": str(f)} for f in folders[len(base) :]]
    parameters = {"weight": 0.5, "t": 0.4, **more.pop("parameters", {})}
    options = more.pop("options", {})
    recipe = {"merge_method": method, "models": models, "parameters": parameters, **base, **more}
    folder = mergekit.run_merge(recipe, tmp_path / out, **options)
    return json.loads((folder / "merge_stats.json").read_text()), read_model(folder)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["all elements", "sample"])
def test_figures_of_deltas(tmp_path, shapes):
    folders = family(tmp_path, 4, F32, shapes, delta=0.01)
    stats, result = merged(tmp_path, "task_arithmetic", folders)
    base, *others = map(read_model, folders)

    # A sample of a sixteenth of a million elements tells lengths to a few parts in a thousand.
    def near(x):
        return pytest.approx(x, **({"rel": 1e-5} if shapes is SMALL else {"rel": 0.02, "abs": 0.01}))

    for name in shapes:
        figures = stats["tensors"][name]
        deltas = [o[name] - base[name] for o in others]
        assert figures["elements"] == base[name].size
        assert (figures["share"] == 1) == (shapes is SMALL)
        assert figures["deltas"] == near([np.linalg.norm(d) for d in deltas])
        assert figures["cosines"] == near([cosine(a, b) for a, b in combinations(deltas, 2)])
        assert figures["norms"] == near([np.linalg.norm(x[name]) for x in (base, *others)])
        assert figures["result"] == near(np.linalg.norm(result[name]))
        assert figures["change"] == near(np.linalg.norm(result[name] - base[name]))
        up, down = (sum(s * d > 0 for d in deltas) for s in (1, -1))
        assert figures["sign_conflict"] == near(((up > 0) & (down > 0)).sum() / (up + down > 1).sum())
        assert figures["nonfinite"] == 0
    assert stats["summary"]["elements"] == sum(base[n].size for n in shapes)


def test_the_sample_is_a_sixteenth(tmp_path):
    stats, _ = merged(tmp_path, "linear", family(tmp_path, 2, F32, LARGE))
    assert stats["tensors"]["w"]["share"] == pytest.approx(1 / 16, rel=0.15)
    assert stats["tensors"]["w"]["exact"] == []


def test_a_method_that_needs_the_gram_matrix_tells_it_exactly(tmp_path):
    folders = family(tmp_path, 2, F32, LARGE)
    stats, _ = merged(tmp_path, "slerp", folders)
    figures = stats["tensors"]["w"]
    assert figures["share"] < 0.1
    assert figures["exact"] == ["norms"]
    assert figures["norms"] == pytest.approx([np.linalg.norm(read_model(f)["w"]) for f in folders], rel=1e-5)
    folders = family(tmp_path / "three", 3, F32, LARGE)
    stats, _ = merged(tmp_path, "model_stock", folders, "stock")
    figures = stats["tensors"]["w"]
    base, *others = (read_model(f)["w"] for f in folders)
    assert figures["exact"] == ["cosines", "deltas"]
    assert figures["deltas"] == pytest.approx([np.linalg.norm(o - base) for o in others], rel=1e-5)
    assert figures["cosines"] == [pytest.approx(cosine(*(o - base for o in others)), abs=1e-5)]


def test_without_a_base_angles_are_those_of_the_models(tmp_path):
    folders = family(tmp_path, 3, F32, SMALL)
    stats, _ = merged(tmp_path, "linear", folders)
    models = [read_model(f)["norm"] for f in folders]
    figures = stats["tensors"]["norm"]
    assert figures["cosines"] == pytest.approx([cosine(a, b) for a, b in combinations(models, 2)], rel=1e-4)
    assert "deltas" not in figures
    assert "survival" not in figures


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "linear", "slerp"])
def test_statistics_change_no_weight(tmp_path, method):
    folders = family(tmp_path, 2 if method == "slerp" else 3, BF16, LARGE)
    with_stats, without = tmp_path / "a", tmp_path / "b"
    merged(tmp_path, method, folders, "a", parameters={"density": 0.5})
    models = [{"model": str(f)} for f in folders]
    recipe = {"merge_method": method, "models": models[method != "linear" :],
              "parameters": {"weight": 0.5, "t": 0.4, "density": 0.5}}  # fmt: skip
    if method != "linear":
        recipe["base_model"] = str(folders[0])
    mergekit.run_merge(recipe, without, statistics=False, threads=3)
    assert not (without / "merge_stats.json").exists()
    assert (with_stats / "model.safetensors").read_bytes() == (without / "model.safetensors").read_bytes()


def test_threads_do_not_matter(tmp_path):
    folders = family(tmp_path, 3, BF16, LARGE)
    texts = []
    for threads in (1, 5):
        merged(tmp_path, "task_arithmetic", folders, f"out{threads}", options={"threads": threads})
        texts.append((tmp_path / f"out{threads}" / "merge_stats.json").read_bytes())
    assert texts[0] == texts[1]


def test_figures_survive_an_interruption(tmp_path, monkeypatch):
    from mergekit.output.staging import Staging

    folders = family(tmp_path, 3, BF16, {f"layers.{i}.w": (40, 30) for i in range(6)})
    whole, _ = merged(tmp_path, "task_arithmetic", folders, "whole")
    finish, seen = Staging.finish, []

    def stop(self, output, *rest):
        finish(self, output, *rest)
        seen.append(output)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            merged(tmp_path, "task_arithmetic", folders, options={"threads": 1})
    resumed, _ = merged(tmp_path, "task_arithmetic", folders)
    assert resumed == whole


def gentle(folder: Path) -> list[Path]:
    """A base of bfloat16 numbers, and two models a thousandth away from it."""
    random = np.random.default_rng(3)
    base = decode(encode(random.standard_normal(LARGE["w"]), BF16), BF16, LARGE["w"])
    deltas = [1e-3 * random.standard_normal(base.shape) * scale for scale in (0, 1, 1)]
    return [write_model(folder / f"m{i}", {"w": np.float32(base + d)}) for i, d in enumerate(deltas)]


def test_small_changes_lost_to_rounding_are_told(tmp_path, caplog):
    folders = gentle(tmp_path)
    stats, _ = merged(tmp_path, "task_arithmetic", folders, dtype="bfloat16")
    survival = stats["tensors"]["w"]["survival"]
    assert survival < 0.8
    assert f"(w keeps {survival:.0%})" in caplog.text
    assert "rounding: stochastic" in caplog.text


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_stochastic_rounding_keeps_small_changes(tmp_path, caplog, dtype):
    folders = gentle(tmp_path)
    stats, result = merged(tmp_path, "task_arithmetic", folders, dtype=dtype.name, rounding="stochastic")
    base, *others = (read_model(f)["w"] for f in folders)
    wanted = 0.5 * sum(o - base for o in others)
    kept = ((result["w"] - base) * wanted).sum() / (wanted**2).sum()
    assert kept == pytest.approx(1, abs=0.02)
    assert stats["tensors"]["w"]["survival"] == pytest.approx(1, abs=0.08)
    assert "rounding" not in caplog.text
    assert stats["rounding"] == "stochastic"


def test_stochastic_rounding_is_the_same_for_any_threads_and_differs_by_seed(tmp_path):
    folders = family(tmp_path, 2, F32, LARGE)
    files = []
    for i, (threads, seed) in enumerate([(1, 0), (4, 0), (2, 1)]):
        merged(tmp_path, "linear", folders, f"out{i}", dtype="bfloat16", rounding="stochastic",
               options={"threads": threads, "seed": seed})  # fmt: skip
        files.append((tmp_path / f"out{i}" / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_non_finite_values_are_counted(tmp_path):
    values = np.zeros((300, 400), np.float32)
    values[7, 3:6] = np.inf
    folders = [write_model(tmp_path / "a", {"w": np.ones_like(values)}), write_model(tmp_path / "b", {"w": values})]
    stats, _ = merged(tmp_path, "linear", folders, options={"allow_nonfinite": True})
    assert stats["tensors"]["w"]["nonfinite"] == 3
    assert stats["summary"]["nonfinite"] == 3
    json.dumps(stats, allow_nan=False)


def test_an_unknown_rounding_is_refused(tmp_path):
    folders = family(tmp_path, 2)
    with pytest.raises(mergekit.MergekitError, match=r"no rounding 'up'. Valid: nearest, stochastic"):
        merged(tmp_path, "linear", folders, rounding="up")


def test_the_summary_takes_all_tensors_as_one(tmp_path):
    folders = family(tmp_path, 3, F32, SMALL, delta=0.01)
    summary = merged(tmp_path, "task_arithmetic", folders)[0]["summary"]
    base, *others = ({n: x.ravel() for n, x in read_model(f).items()} for f in folders)
    deltas = [np.concatenate([o[n] - base[n] for n in SMALL]) for o in others]
    assert list(summary["deltas"].values()) == pytest.approx([np.linalg.norm(d) for d in deltas], rel=1e-4)
    assert list(summary["deltas"]) == [f.name for f in folders[1:]]
    assert summary["cosines"] == {"m1, m2": pytest.approx(cosine(*deltas), rel=1e-3)}
    assert summary["change"] == pytest.approx(np.linalg.norm(0.5 * sum(deltas)), rel=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_goes_on_with_other_ideas_of_statistics(tmp_path, monkeypatch, first):
    from mergekit.output.staging import Staging

    folders = family(tmp_path, 3, BF16, {f"layers.{i}.w": (40, 30) for i in range(6)})
    models = [{"model": str(f)} for f in folders[1:]]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folders[0]), "models": models,
              "parameters": {"weight": 0.5}}  # fmt: skip
    finish, seen = Staging.finish, []

    def stop(self, output, *rest):
        finish(self, output, *rest)
        seen.append(output.name)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            mergekit.run_merge(recipe, tmp_path / "out", threads=1, statistics=first)
    mergekit.run_merge(recipe, tmp_path / "out", statistics=not first)
    path = tmp_path / "out" / "merge_stats.json"
    assert path.exists() != first
    if not first:
        stats = json.loads(path.read_text())
        assert (stats["copied"], stats["unknown"]) == (0, seen)
        assert stats["summary"]["tensors"] == 3
