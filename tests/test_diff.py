"""``mergekit diff``: figures against plain NumPy, what can't be compared, the reading, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest

import command
from files import llama, write_safetensors
from files import write_model as write_llama
from lora_files import low_rank, write_adapter
from mergekit.api import advise, reading
from mergekit.api.compare import diff
from mergekit.api.comparison import Figures, Spectrum
from mergekit.dtypes import BF16, F16, F32
from mergekit.errors import CheckpointError, IncompatibleError, UsageError
from models import family, read_model, write_model

SHAPES = {
    "model.embed_tokens.weight": (61, 13),
    **{f"model.layers.{i}.self_attn.q_proj.weight": (29, 13) for i in range(3)},
    **{f"model.layers.{i}.mlp.down_proj.weight": (13, 31) for i in range(3)},
    "model.norm.weight": (13,),
}


def expected(folders, names) -> dict[str, list[float]]:
    """The figures of some tensors taken as one vector, in float64."""
    first, *others = [np.concatenate([read_model(f)[n].ravel() for n in names]) for f in folders]
    deltas = [other - first for other in others]
    pairs = [(a, b) for i, a in enumerate(deltas) for b in deltas[i + 1 :]]
    return {
        "moved": [np.linalg.norm(d) / np.linalg.norm(first) for d in deltas],
        "similarity": [first @ o / np.linalg.norm(first) / np.linalg.norm(o) for o in others],
        "changed": [np.mean(d != 0) for d in deltas],
        "cosines": [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs],
        "conflicts": [np.mean((a * b < 0)[(a != 0) & (b != 0)]) for a, b in pairs],
    }


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_figures_are_those_of_numpy(tmp_path, dtype):
    folders = family(tmp_path, 4, dtype, SHAPES)
    record = diff(*folders).record()
    layer = [n for n in SHAPES if "layers.1." in n]
    groups = {
        "total": (record["total"], SHAPES),
        "role": (record["roles"]["q"], [n for n in SHAPES if "q_proj" in n]),
        "layer": (record["layers"]["1"], layer),
        "tensor": (record["tensors"][layer[0]], layer[:1]),
    }
    for found, names in groups.values():
        for figure, values in expected(folders, names).items():
            np.testing.assert_allclose(found[figure], values, rtol=2e-5, atol=2e-6, err_msg=figure)


def test_the_same_figures_on_any_number_of_threads(tmp_path, monkeypatch):
    from mergekit.execute import work

    monkeypatch.setattr(work, "RANGE", 1 << 12)
    folders = family(tmp_path, 3, BF16, {"a.weight": (331, 101), "b.weight": (7,)})
    one, many = (diff(*folders, threads=n) for n in (1, 5))
    for a, b in zip(one.sums, many.sums, strict=True):
        assert np.array_equal(a.products, b.products)
        assert np.array_equal(a.counts, b.counts)


def test_the_spectrum_is_that_of_the_delta(tmp_path):
    tensors = {"x.weight": np.random.default_rng(0).standard_normal((23, 41))}
    low = np.outer(np.arange(1.0, 24), np.ones(41)) * 1e-2
    folders = [
        write_model(tmp_path / "a", tensors),
        write_model(tmp_path / "b", {"x.weight": tensors["x.weight"] + low}),
    ]
    folders.append(write_model(tmp_path / "c", {"x.weight": np.random.default_rng(1).standard_normal((23, 41))}))
    found = diff(*folders, spectrum=True).spectra["x.weight"]
    assert (found[1].rank_90, found[1].full_rank) == (1, 23)
    assert found[1].stable_rank == pytest.approx(1, abs=1e-4)
    deltas = np.linalg.svd(read_model(folders[2])["x.weight"] - read_model(folders[0])["x.weight"], compute_uv=False)
    np.testing.assert_allclose(found[2].largest, deltas[:8], rtol=1e-6)
    assert found[2].rank_90 == 1 + int(np.searchsorted(np.cumsum(deltas**2), 0.9 * (deltas**2).sum()))
    assert Spectrum.of(np.zeros(3)) == Spectrum((0.0, 0.0, 0.0), 0.0, 0, 3)


def test_an_adapter_is_a_delta_of_low_rank(tmp_path):
    base, adapter = write_llama(tmp_path / "base"), write_adapter(tmp_path / "lora", low_rank(3))
    found = diff(base, f"{base}+{adapter}", spectrum=True)
    assert {p.role for p, s in zip(found.places, found.sums, strict=True) if Figures(s).moved(1)} == {
        "q",
        "k",
        "up",
        "down",
    }
    ranks = [s[1].rank_90 for n, s in found.spectra.items() if "q_proj" in n]
    assert ranks
    assert max(ranks) <= 3


def test_what_is_not_in_both_is_told(tmp_path):
    value = np.random.default_rng(0).standard_normal
    first = {
        "embed_tokens.weight": value((7, 5)),
        "a.weight": value((3, 5)),
        "b.weight": value(5),
        "c.weight": value(2),
    }
    other = {**first, "embed_tokens.weight": value((9, 5)), "b.weight": value(4), "d.weight": value(2)}
    del other["c.weight"]
    found = diff(write_model(tmp_path / "a", first), write_model(tmp_path / "b", other))
    assert [(p.name, p.shape) for p in found.places] == [("embed_tokens.weight", (7, 5)), ("a.weight", (3, 5))]
    assert found.remarks == (
        "compared in the first 7 rows that all have: embed_tokens.weight",
        "not compared, for b has other shapes: b.weight [4]",
        "not compared, for b has none: c.weight",
        "only b has: d.weight",
    )
    with pytest.raises(IncompatibleError, match="no tensor in common"):
        diff(tmp_path / "a", write_model(tmp_path / "c", {"e.weight": value(3)}))
    with pytest.raises(UsageError, match="two models or more"):
        diff(tmp_path / "a")


def test_integers_and_damage_are_told(tmp_path):
    tensors = {**llama(0), "steps": ("I64", np.arange(3))}
    for name in "ab":
        write_llama(tmp_path / name)
        write_safetensors(tmp_path / name / "model.safetensors", tensors)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.remarks == ("not compared, for they are integers in a: steps",)
    assert reading(found) == ["b has the weights of a, as far as they were compared."]
    write_safetensors(tmp_path / "b/model.safetensors", {**tensors, "model.norm.weight": ("I64", np.arange(7))})
    found = diff(tmp_path / "a", tmp_path / "b")
    assert "not compared, for they are integers in b: model.norm.weight" in found.remarks
    bad = {"x.weight": np.array([[1.0, np.nan]]), "y.weight": np.ones((2, 2))}
    found = diff(write_model(tmp_path / "c", bad), write_model(tmp_path / "d", {**bad, "x.weight": np.ones((1, 2))}))
    assert "sums over tensors with NaN or infinity tell nothing: x.weight" in found.remarks
    assert "d or c holds NaN or infinity" in reading(found)[0]
    assert "can't be compared" in advise(found).reasons[0]
    spectra = diff(tmp_path / "c", tmp_path / "d", spectrum=True).spectra
    assert set(spectra) == {"y.weight"}
    assert found.by_tensor()["x.weight"].moved(1) is None
    assert found.by_tensor()["y.weight"].moved(1) == 0
    assert json.loads(json.dumps(found.record(), allow_nan=False))
    assert reading(found)


def test_layers_that_are_not_numbered_in_order_are_told(tmp_path):
    value = np.random.default_rng(0).standard_normal
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": value((3, 5)) for n in (0, 2, 7)}
    found = diff(write_model(tmp_path / "a", tensors), write_model(tmp_path / "b", tensors))
    assert found.remarks == ("the layers of a are not numbered 0, 1, 2, ..., so nothing is told by layer",)


def test_weights_of_a_model_that_is_cut_short(tmp_path):
    folders = family(tmp_path, 2, F32, SHAPES)
    path = folders[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        diff(*folders)


def relatives(tmp_path, *deltas) -> list:
    """A model of random weights, and one for each delta (relative lengths, seed)."""
    random = np.random.default_rng(0)
    base = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    folders = [write_model(tmp_path / "base", base)]
    for number, (size, seed) in enumerate(deltas):
        other = np.random.default_rng(seed)
        tensors = {n: v + size * other.standard_normal(v.shape) for n, v in base.items()}
        folders.append(write_model(tmp_path / f"m{number}", tensors))
    return folders


@pytest.mark.parametrize(
    ("deltas", "method", "weights", "words"),
    [
        ([(0.0, 1)], None, (), ["m0 has the weights of base"]),
        ([(0.001, 1)], "slerp", (0.5,), ["what storing weights as bfloat16 may do"]),
        ([(0.05, 1)], "slerp", (0.5,), ["m0 is related to base"]),
        ([(0.05, 1), (0.05, 2)], "task_arithmetic", (0.71, 0.71), ["changed independently"]),
        ([(0.05, 1), (0.05, 1)], "linear", (1.0, 1.0), ["learnt much the same"]),
        ([(0.05, 1), (-0.05, 1)], "ties", (1.0, 1.0), ["pull in opposite directions", "100 % go"]),
        ([(0.05, 1), (0.3, 2)], "task_arithmetic", (0.71, 0.71), ["changed independently"]),
        ([(30.0, 1), (0.05, 2)], None, (), ["trained independently"]),
        ([(1.0, 1)], None, (), ["is far from base"]),
    ],
)  # fmt: skip
def test_the_reading(tmp_path, deltas, method, weights, words):
    comparison = diff(*relatives(tmp_path, *deltas))
    advice = advise(comparison)
    text = "\n".join(reading(comparison))
    assert all(word in text for word in words), text
    assert advice.method == method
    assert advice.weights == pytest.approx(weights, abs=0.03)
    assert any("times as far" in reason for reason in advice.reasons) == (deltas[-1][0] == 0.3)


def test_cosines_are_over_the_tensors_that_both_models_have(tmp_path):
    base, a, b = relatives(tmp_path, (0.05, 1), (0.05, 2))
    name = "model.layers.1.self_attn.q_proj.weight"
    large = read_model(a)[name] * 9
    write_model(tmp_path / "x", {**read_model(a), name: large})
    write_model(tmp_path / "y", {n: v for n, v in read_model(b).items() if n != name})
    record = diff(base, tmp_path / "x", tmp_path / "y").record()
    shared = expected([base, a, b], [n for n in SHAPES if n != name])
    assert record["total"]["cosines"] == pytest.approx(shared["cosines"], abs=1e-5)
    assert record["tensors"][name]["cosines"] == [None]
    text = "\n".join(reading(diff(base, tmp_path / "x", write_model(tmp_path / "z", {name: large}))))
    assert "z left alone" not in text, "it has nothing else"


def test_models_that_differ_in_norms_only_differ(tmp_path):
    folders = relatives(tmp_path, (0.0, 1))
    write_model(tmp_path / "n", {n: v * (2 if "norm" in n else 1) for n, v in read_model(folders[0]).items()})
    comparison = diff(folders[0], tmp_path / "n")
    assert reading(comparison)[0] == "n has the matrices of base; what differs are norms, biases or single numbers."
    assert advise(comparison).method == "slerp"


def test_without_a_common_base_nothing_is_said_of_what_was_learnt(tmp_path):
    folders = relatives(tmp_path, (0.05, 1), (0.05, 2), (0.05, 3))[1:]
    siblings = diff(*folders)
    assert siblings.total.cosine(1, 2) == pytest.approx(0.5, abs=0.05)
    assert any("only if m0 is what the others were made from" in reason for reason in advise(siblings).reasons)
    found = diff(*folders, common_base=False)
    assert len(reading(found)) == 2
    assert advise(found).method == "linear"
    done = command.mergekit("diff", *folders, "--no-base")
    assert "try linear:" in done.out
    assert "learnt" not in done.out


def test_numbers_of_64_bits_are_told(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        write_llama(tmp_path / name, seed)
        tensors = {n: ("F64", np.asarray(v[1], "<f8")) for n, v in llama(seed, code="F32").items()}
        write_safetensors(tmp_path / name / "model.safetensors", tensors)
    assert any(r.startswith("float64, compared as float32: ") for r in diff(tmp_path / "a", tmp_path / "b").remarks)


def test_weights_keep_the_length_of_the_change(tmp_path):
    """What the advice promises: the merged change is as long as the models' own are on average."""
    folders = relatives(tmp_path, (0.05, 1), (0.05, 2), (0.05, 3))
    weights = advise(diff(*folders)).weights
    base, *others = [np.concatenate([v.ravel() for v in read_model(f).values()]) for f in folders]
    merged = sum(w * (other - base) for w, other in zip(weights, others, strict=True))
    assert np.linalg.norm(merged) == pytest.approx(np.mean([np.linalg.norm(o - base) for o in others]), rel=0.03)


def test_the_command(tmp_path):
    folders = family(tmp_path, 3, BF16, SHAPES, delta=0.05)
    done = command.mergekit("diff", *folders, "--layers", "--tensors", "--spectrum")
    assert done.code == 0, done.err
    record = json.loads(command.mergekit("diff", *folders, "--json", "--quiet").out)
    assert record == {**diff(*folders).record(), "reading": reading(diff(*folders))}
    for text in ("against m0", "[1] m1", "[2] m2", "layer", "tensor", "rank of the change", "* m1 and m2 changed"):
        assert text in done.out
    assert f"{record['roles']['q']['moved'][0] * 100:.3g} %" in done.out
    assert done.err.startswith("read ")
    for arguments, code, words in (
        ([folders[0]], 2, "two models or more"),
        ([folders[0], tmp_path / "none"], 2, "none"),
    ):
        command.assert_refused(command.mergekit("diff", *arguments), code, words)


def test_the_page(tmp_path):
    pytest.importorskip("altair", reason="draws charts")
    folders = family(tmp_path, 3, BF16, SHAPES, delta=0.05)
    strange = folders[1].rename(tmp_path / "<b>x")
    done = command.mergekit("diff", folders[0], strange, folders[2], "--html", tmp_path / "d.html")
    assert done.code == 0, done.err
    text = (tmp_path / "d.html").read_text()
    record = diff(folders[0], strange, folders[2]).record()
    assert "<b>x" not in text
    assert "&lt;b&gt;x" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert str(tmp_path) not in text
    assert text.count("<svg") == 3
    assert f"{record['total']['cosines'][0]:.3f}" in text
    assert f"{record['tensors']['model.norm.weight']['moved'][1] * 100:.3g} %" in text
