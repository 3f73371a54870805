"""Every method against plain float64 NumPy: float32 within 1e-6 of sum |c_i x_i|, 16-bit rounded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mergekit
import oracles
from mergekit.dtypes import BF16, F16, F32, DType
from mergekit.seeds import stream_key
from models import encode, family, read_model

WEIGHT = [0.7, -0.2, 0.4]
DENSITY = [0.5, 0.31, 1.0]
SHAPES = {"a.weight": (3, 7), "layers.0.b": (1031, 5), "layers.1.b": (2, 521, 3), "c": (), "d": (1,)}


def merge(tmp_path: Path, method: str, folders: list[Path], has_base: bool, parameters: dict, per_model: dict, **more):
    """Run a merge of ``folders`` (the first is the base if there is one) and return its tensors."""
    inputs = folders[1:] if has_base else folders
    models = [
        {"model": str(folder), "parameters": {key: values[i] for key, values in per_model.items()}}
        for i, folder in enumerate(inputs)
    ]
    recipe = {"merge_method": method, "models": models, "parameters": parameters, **more}
    if has_base:
        recipe["base_model"] = str(folders[0])
        recipe["models"].insert(0, {"model": str(folders[0])})
    return read_model(mergekit.run_merge(recipe, tmp_path / "out"))


def assert_close(got: dict, want: dict, scale: dict, dtype: DType) -> None:
    """float32: 1e-6 of the scale; bfloat16 and float16: the oracle rounded once, or one unit in the last place off."""
    for name, expected in want.items():
        if dtype == F32:
            assert np.abs(got[name] - expected).max() <= 1e-6 * scale[name].max(), name
            continue
        # A value within the float32 tolerance of the oracle, rounded once to 8 or 11 bits.
        half_unit = np.maximum(abs(expected) * (2.0**-8 if dtype == BF16 else 2.0**-11), 2.0**-25)
        assert (abs(got[name] - expected) <= half_unit * 1.001 + 1e-6 * scale[name].max()).all(), name
        same = np.frombuffer(encode(got[name], dtype), np.uint16) == np.frombuffer(encode(expected, dtype), np.uint16)
        assert same.mean() >= (0.98 if same.size > 100 else 0), name


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(tmp_path, dtype, normalize):
    folders = family(tmp_path, 3, dtype, SHAPES)
    sources = [read_model(f) for f in folders]
    got = merge(tmp_path, "linear", folders, False, {"normalize": normalize}, {"weight": WEIGHT})
    want = {n: oracles.linear([s[n] for s in sources], WEIGHT, normalize) for n in SHAPES}
    scale = {n: sum(abs(w) * abs(s[n]) for w, s in zip(WEIGHT, sources, strict=True)) for n in SHAPES}
    assert_close(got, want, scale, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("t", "delta"), [(0.0, 0.3), (0.37, 0.3), (1.0, 0.3), (0.5, 0.001), (1.4, 2.0)])
def test_slerp(tmp_path, dtype, t, delta):
    folders = family(tmp_path, 2, dtype, SHAPES, delta)
    base, other = map(read_model, folders)
    got = merge(tmp_path, "slerp", folders, True, {"t": t}, {})
    want = {n: oracles.slerp(base[n], other[n], t) for n in SHAPES}
    assert_close(got, want, {n: 3 * (abs(base[n]) + abs(other[n])) for n in SHAPES}, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(tmp_path, dtype, normalize):
    folders = family(tmp_path, 4, dtype, SHAPES)
    base, *others = map(read_model, folders)
    got = merge(tmp_path, "task_arithmetic", folders, True, {"normalize": normalize, "lambda": 0.8}, {"weight": WEIGHT})
    want = {n: oracles.task_arithmetic(base[n], [o[n] for o in others], WEIGHT, normalize, 0.8) for n in SHAPES}
    assert_close(got, want, {n: abs(base[n]) + sum(abs(o[n]) for o in others) for n in SHAPES}, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_sparse(tmp_path, dtype, normalize, rescale, method):
    folders = family(tmp_path, 4, dtype, SHAPES)
    base, *others = map(read_model, folders)
    got = merge(
        tmp_path,
        method,
        folders,
        True,
        {"normalize": normalize, "rescale": rescale, "lambda": 0.8},
        {"weight": WEIGHT, "density": DENSITY},
        seed=5,
    )
    want = {}
    for name in SHAPES:
        deltas = [np.float32(o[name]) - np.float32(base[name]) for o in others]
        masks = [
            oracles.top_magnitude(d, density)
            if method == "ties"
            else oracles.random_mask(d.shape, density, stream_key(5, name, position))
            for position, (d, density) in enumerate(zip(deltas, DENSITY, strict=True), start=1)
        ]
        want[name] = oracles.sparse(
            base[name], deltas, masks, WEIGHT, consensus=method != "dare_linear", normalize=normalize, rescale=rescale,
            factor=0.8,
        )  # fmt: skip
    scale = {n: 3 * (abs(base[n]) + sum(abs(o[n]) for o in others)) for n in SHAPES}
    assert_close(got, want, scale, dtype)


def test_passthrough_copies_bytes(tmp_path):
    (folder,) = family(tmp_path, 1, BF16, SHAPES)
    got = merge(tmp_path, "passthrough", [folder], False, {}, {})
    want = read_model(folder)
    assert all((got[n] == want[n]).all() for n in SHAPES)


def test_passthrough_scales_what_the_filter_names(tmp_path):
    (folder,) = family(tmp_path, 1, F32, SHAPES)
    scale = [{"filter": "layers.1", "value": 0.5}]
    got, want = merge(tmp_path, "passthrough", [folder], False, {"scale": scale}, {}), read_model(folder)
    for name in SHAPES:
        assert (got[name] == want[name] * (0.5 if "layers.1" in name else 1)).all()


def test_deltas_at_one_ten_thousandth_keep_their_direction(tmp_path):
    folders = family(tmp_path, 3, F32, {"w": (1009, 101)}, delta=1e-4)
    base, *others = (read_model(f)["w"] for f in folders)
    got = merge(tmp_path, "task_arithmetic", folders, True, {}, {"weight": [0.6, 0.4]})["w"] - base
    want = 0.6 * (others[0] - base) + 0.4 * (others[1] - base)
    assert (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want) > 1 - 1e-3


def test_mixed_dtypes_promote_to_float32(tmp_path):
    a = family(tmp_path / "x", 1, BF16, SHAPES)
    b = family(tmp_path / "y", 2, F16, SHAPES)[1:]
    plan = mergekit.plan(
        {"merge_method": "linear", "models": [{"model": str(f)} for f in a + b], "parameters": {"weight": 1}}
    )
    assert {o.dtype for o in plan.outputs} == {F32}
