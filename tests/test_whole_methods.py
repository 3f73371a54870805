"""The methods of whole tensors and their engine, against dense float64 linear algebra."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mergekit
import whole_oracles as oracles
from engine import merge
from kernel_cases import BACK_ENDS, back_end
from mergekit import api
from mergekit.api import RunOptions
from mergekit.dtypes import BF16, F16, F32
from mergekit.errors import NonFiniteError, RecipeError
from mergekit.execute import whole_work, work
from mergekit.execute.memory import buffer_bytes
from mergekit.kernels.accelerator import TorchKernels
from mergekit.methods import get_method, method_names
from mergekit.methods.spectral import matrix_shape
from mergekit.methods.svc import svc
from mergekit.planning.expression import Apply
from models import decode, encode, family, read_model

SHAPES = [(24, 41), (41, 24), (3, 17, 23), (7, 1, 5), (5, 2, 3, 4), (13, 1), (1, 13), (17,), (1,), ()]
SPECTRAL = {
    "tsv_m": (oracles.tsv_m, {"lambda": 0.7}, {"lambda_": 0.7}),
    "iso_c": (oracles.iso_c, {"lambda": 1.3}, {"lambda_": 1.3}),
    "iso_cts": (oracles.iso_cts, {"common_space_fraction": 0.6}, {"fraction": 0.6}),
    "star": (oracles.star, {"eta": 55.0}, {"eta": 55.0}),
    "wudi": (oracles.wudi, {"steps": 40, "learning_rate": 1e-3}, {"steps": 40, "rate": 1e-3}),
}


def tensors(shape: tuple[int, ...], count: int = 4, delta: float = 0.1, seed: int = 0) -> list[np.ndarray]:
    """A base and models made from it, that share some of what they learnt."""
    random = np.random.default_rng([seed, *shape])
    base, shared = random.standard_normal(shape), random.standard_normal(shape)
    others = [base + delta * (0.5 * shared + random.standard_normal(shape)) for _ in range(count - 1)]
    return [np.asarray(x, np.float32) for x in (base, *others)]


def stored(inputs: list[np.ndarray], dtype) -> list[np.ndarray]:
    """The inputs as they are once stored as ``dtype``."""
    return [decode(encode(x, dtype), dtype, x.shape) for x in inputs]


def deltas_of(inputs: list[np.ndarray]) -> list[np.ndarray]:
    """What the methods are given: float32 differences."""
    return [(np.float32(x) - np.float32(inputs[0])).astype(np.float64) for x in inputs[1:]]


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative distance, by the Frobenius norm."""
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


@pytest.mark.parametrize("back", BACK_ENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_methods(name, shape, back):
    oracle, given, wanted = SPECTRAL[name]
    inputs = tensors(shape)
    got, deltas = merge(name, inputs, kernels=back_end(back), **given) - inputs[0], deltas_of(inputs)
    # Deltas may cancel, so what they lose is measured against the largest of them.
    assert np.linalg.norm(got - oracle(deltas, **wanted)) < 3e-6 * max(np.linalg.norm(d) for d in deltas)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", SPECTRAL)
def test_results_are_rounded_once(name, dtype):
    oracle, given, wanted = SPECTRAL[name]
    inputs = stored(tensors((24, 41)), dtype)
    got = merge(name, inputs, dtype=dtype, **given)
    want = inputs[0] + oracle(deltas_of(inputs), **wanted)
    unit = 2.0**-8 if dtype == BF16 else 2.0**-11
    assert (abs(got - want) <= abs(want) * unit * 1.001 + 1e-5).all()
    assert np.mean(got == decode(encode(want, dtype), dtype, want.shape)) > 0.98


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("shape", [(2, 2), (2, 9), (3, 5), (30, 10)], ids=str)
@pytest.mark.parametrize("name", SPECTRAL)
def test_any_number_of_models(name, shape, count):
    oracle, given, wanted = SPECTRAL[name]
    if name == "tsv_m" and count - 1 > min(shape):
        pytest.skip("more directions than dimensions: tested by itself")
    inputs = tensors(shape, count)
    assert error(merge(name, inputs, **given) - inputs[0], oracle(deltas_of(inputs), **wanted)) < 2e-5


def test_more_models_than_dimensions():
    inputs = tensors((2, 9), 6)
    got = merge("tsv_m", inputs) - inputs[0]
    assert np.isfinite(got).all()
    assert np.linalg.matrix_rank(got, tol=1e-4) == 2


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 0.97, 1.0])
def test_iso_cts_shares_of_common_space(fraction):
    inputs = tensors((20, 31))
    got = merge("iso_cts", inputs, common_space_fraction=fraction) - inputs[0]
    assert error(got, oracles.iso_cts(deltas_of(inputs), fraction=fraction)) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 1.0, 40.0, 99.0, 100.0])
def test_star_shares_of_the_nuclear_norm(eta):
    inputs = tensors((20, 31))
    got = merge("star", inputs, eta=eta) - inputs[0]
    want = oracles.star(deltas_of(inputs), eta)
    assert error(got, want) < 1e-5
    if eta == 100:
        assert error(got, sum(deltas_of(inputs)) / 3) < 1e-5


def spectrum(values: np.ndarray, columns: int, seed: int = 0) -> np.ndarray:
    """A matrix of these singular values."""
    random = np.random.default_rng(seed)
    u = np.linalg.qr(random.standard_normal((len(values), len(values))))[0]
    v = np.linalg.qr(random.standard_normal((columns, len(values))))[0]
    return (u * values @ v.T).astype(np.float32)


@pytest.mark.parametrize("transposed", [False, True])
def test_small_singular_values_are_exact(transposed):
    delta = spectrum(np.geomspace(1, 1e-4, 150), 311)
    delta = np.ascontiguousarray(delta.T) if transposed else delta
    got = merge("iso_c", [np.zeros_like(delta), delta])
    assert error(got, oracles.iso_c([delta.astype(np.float64)])) < 3e-6
    values = np.linalg.svd(got, compute_uv=False)
    assert abs(values / values.mean() - 1).max() < 1e-5


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_absent_directions_stay_absent(name):
    random = np.random.default_rng(2)
    # Whole numbers, so that float32 holds the product exactly.
    factors = [random.integers(-8, 9, (40, 5)) @ random.integers(-8, 9, (5, 60)) for _ in range(2)]
    deltas = [f.astype(np.float32) for f in factors]
    got = merge(name, [np.zeros_like(deltas[0]), *deltas])
    values = np.linalg.svd(got, compute_uv=False)
    assert values[9] > 0.5 * values[0]
    assert values[10] < 1e-5 * values[0]


def test_a_direction_that_models_share_counts_once():
    inputs = tensors((20, 30), 2)
    u, s, v = oracles.svd(deltas_of(inputs)[0])
    got = merge("tsv_m", [inputs[0], inputs[1], inputs[1]]) - inputs[0]
    assert error(got, u[:, :10] * s[:10] @ v[:10]) < 1e-5


@pytest.mark.parametrize("factor", [1e-18, 1e-6, 1e12])
@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "star"])
def test_lengths_do_not_matter(name, factor):
    oracle, given, wanted = SPECTRAL[name]
    deltas = [factor * d for d in deltas_of(tensors((20, 31)))]
    inputs = [np.zeros((20, 31), np.float32), *(d.astype(np.float32) for d in deltas)]
    assert error(merge(name, inputs, **given), oracle(deltas, **wanted)) < 1e-5


@pytest.mark.parametrize("shape", [(12, 10), (3, 40)], ids=str)
def test_wudi_takes_the_steps_of_torch(shape):
    inputs = tensors(shape)
    deltas = [torch.from_numpy(d).float() for d in deltas_of(inputs)]
    merged = torch.nn.Parameter(sum(deltas))
    adam = torch.optim.Adam([merged], lr=1e-4)
    for _ in range(25):
        adam.zero_grad()
        loss = sum(((merged - d) @ d.T).square().sum() / d.square().sum() for d in deltas)
        loss.backward()
        adam.step()
    got = merge("wudi", inputs, steps=25, learning_rate=1e-4) - inputs[0]
    start = sum(deltas_of(inputs))
    # What the steps changed, not what they started from.
    assert np.linalg.norm(got - merged.detach().numpy()) < 2e-3 * np.linalg.norm(merged.detach().numpy() - start)
    deltas64 = deltas_of(inputs)
    assert oracles.wudi_loss(got, deltas64) < 0.99 * oracles.wudi_loss(start, deltas64)


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("shape", [(24, 41), (41, 24), (3, 17, 23), (17,)], ids=str)
def test_wudi_in_closed_form(shape, ridge):
    inputs = tensors(shape)
    got = merge("wudi", inputs, solver="closed", ridge=ridge) - inputs[0]
    assert error(got, oracles.wudi_closed(deltas_of(inputs), ridge)) < 1e-5


def test_wudi_of_an_unchanged_model_is_the_others_merge():
    inputs = tensors((12, 10))
    for given in ({"steps": 5}, {"solver": "closed"}):
        assert np.array_equal(merge("wudi", [*inputs, inputs[0]], **given), merge("wudi", inputs, **given))


@pytest.mark.parametrize("back", BACK_ENDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(31, 17), (2, 9, 5), (1031,), (5,), (1,), (), (3, 2049)], ids=str)
def test_arcee_fusion(shape, dtype, back):
    base, model = stored(tensors(shape, 2, 1.0), dtype)
    importance = oracles.arcee_importance(base, model)
    threshold = oracles.arcee_threshold(importance)
    got = merge("arcee_fusion", [base, model], dtype=dtype, kernels=back_end(back))
    clear = abs(importance - threshold) > 1e-9 * threshold
    want = np.where(importance >= threshold, model, base)
    assert np.array_equal(got[clear], want[clear])
    assert clear.sum() >= got.size - 2
    if got.size > 100:
        assert 0.02 < np.mean(got == model) < 0.3


def test_arcee_fusion_tells_tiny_rows_apart():
    """Rows of real weights differ by so little that float32 would lose the divergence."""
    random = np.random.default_rng(5)
    base = (0.02 * random.standard_normal((40, 500))).astype(np.float32)
    change = (1e-4 * random.standard_normal((40, 500)) * np.geomspace(0.1, 1, 40)[:, None]).astype(np.float32)
    got = merge("arcee_fusion", [base, base + change])
    importance = oracles.arcee_importance(np.float64(base), np.float64(base + change))
    assert np.array_equal(got != base, (importance >= oracles.arcee_threshold(importance)) & (base + change != base))


def test_equal_inputs_are_returned():
    for name in ("arcee_fusion", *SPECTRAL):
        base = tensors((20, 30))[0]
        assert np.array_equal(merge(name, [base, base]), base.astype(np.float64)), name


@pytest.mark.parametrize("name", ["tsv_m", "arcee_fusion"])
def test_blocks_and_ranges_do_not_change_a_byte(monkeypatch, name):
    inputs = tensors((130, 97), 2 if name == "arcee_fusion" else 3)
    whole = merge(name, inputs, dtype=BF16)
    monkeypatch.setattr(work, "RANGE", 1 << 10)
    monkeypatch.setattr(work, "ALIGNMENT", 64)
    for block in (64, 1000, 1 << 20):
        assert np.array_equal(merge(name, inputs, dtype=BF16, block=block), whole)


def test_lines_scale_what_is_added():
    inputs = tensors((20, 30))
    whole, half = (merge("iso_c", inputs, scale=scale) - inputs[0] for scale in (1.0, 0.5))
    assert error(half, whole / 2) < 1e-5


# Calibration


@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_calibration(shape, alpha):
    deltas = deltas_of(tensors(shape))
    got = svc(torch.tensor(sum(deltas)).float(), [torch.tensor(d).float() for d in deltas], alpha)
    assert error(got.numpy(), oracles.svc(sum(deltas), deltas, alpha)) < 1e-5


def test_calibration_only_shrinks_at_one():
    deltas = deltas_of(tensors((20, 30)))
    got = svc(torch.tensor(sum(deltas)).float(), [torch.tensor(d).float() for d in deltas], 1.0).numpy()
    before, after = (np.linalg.svd(x, compute_uv=False) for x in (sum(deltas), got))
    assert (after <= before * 1.00001).all()
    assert after.sum() < 0.9 * before.sum()


def calibrated(monkeypatch, name, inputs, alpha, **more):
    """The engine's result with ``svc``: an option of the plan, not of the method."""
    monkeypatch.setattr("engine.Apply", lambda *a, **k: Apply(*a, **k, svc=alpha))
    return merge(name, inputs, **more)


DELTA_METHODS = [n for n in method_names() if get_method(n).options]


@pytest.mark.parametrize("back", ["numba", "torch"])
@pytest.mark.parametrize("name", DELTA_METHODS)
def test_any_method_of_deltas_can_be_calibrated(monkeypatch, name, back):
    method = get_method(name)
    given = {p: v for p, v in {"weight": 0.8, "density": 0.6, "t": 0.05}.items() if method.parameter(p)}
    inputs = tensors((24, 41), min(4, method.most or 4))
    deltas = deltas_of(inputs)
    # The same merge on a base of zeros: its own result is then the merged delta.
    merged = merge(name, [np.zeros_like(inputs[0]), *map(np.float32, deltas)], seed=3, **given)
    got = calibrated(monkeypatch, name, inputs, 0.3, seed=3, scale=0.5, kernels=back_end(back), **given) - inputs[0]
    assert error(got, 0.5 * oracles.svc(merged, deltas, 0.3)) < 1e-5


def test_calibration_takes_ranges_and_blocks(monkeypatch):
    inputs = tensors((130, 97))
    given = {"weight": (0.5, 0.7, 0.2), "density": 0.5, "seed": 3}
    whole = calibrated(monkeypatch, "ties", inputs, 1.0, **given)
    monkeypatch.setattr(work, "RANGE", 1 << 12)
    for block in (4096, 1 << 20):
        assert np.array_equal(merge("ties", inputs, block=block, **given), whole)


def recipe(folders: list[Path], method: str, **parameters) -> dict:
    """The first folder is the base."""
    models = [{"model": str(f), "parameters": {"weight": 0.5}} for f in folders[1:]]
    return {"merge_method": method, "base_model": str(folders[0]), "models": models, "dtype": "float32",
            "parameters": parameters}  # fmt: skip


FILES = {"a.weight": (30, 21), "layers.0.w": (21, 30), "layers.1.w": (21, 30), "norm.weight": (21,)}


def test_a_recipe_asks_for_calibration(tmp_path):
    folders = family(tmp_path, 3, F32, FILES, 0.1)
    plan = mergekit.plan(recipe(folders, "task_arithmetic", svc=[{"filter": "layers", "value": 1.0}]))
    found = {o.name: o.expression.svc for o in plan.outputs}
    assert found == {"a.weight": None, "layers.0.w": 1.0, "layers.1.w": 1.0, "norm.weight": None}
    assert mergekit.plan(recipe(folders, "ties", svc=0.5)).outputs[-1].expression.svc is None, (
        "norm.weight is no matrix"
    )
    out = mergekit.run_merge(recipe(folders, "task_arithmetic", svc=1.0), tmp_path / "out")
    got, (base, *others) = read_model(out), map(read_model, folders)
    for name in FILES:
        deltas = [np.float64(np.float32(o[name]) - np.float32(base[name])) for o in others]
        assert error(got[name] - base[name], oracles.svc(0.5 * sum(deltas), deltas, 1.0)) < 1e-5


@pytest.mark.parametrize("value", [0, -1, "much"])
def test_bad_values_are_refused(tmp_path, value):
    folders = family(tmp_path, 3, F32, FILES)
    with pytest.raises(RecipeError, match=r"expected a number|outside"):
        mergekit.plan(recipe(folders, "task_arithmetic", svc=value))
    with pytest.raises(RecipeError):
        mergekit.plan({**recipe(folders, "star"), "parameters": {"eta": 101}})
    with pytest.raises(RecipeError):
        mergekit.plan({**recipe(folders, "iso_cts"), "parameters": {"common_space_fraction": 1.1}})


@pytest.mark.parametrize("method", ["tsv_m", "arcee_fusion", "task_arithmetic"])
def test_threads_do_not_change_a_byte(tmp_path, method):
    folders = family(tmp_path, 2, BF16, {**FILES, "big": (300, 200)}, 0.1)
    given = {"svc": 1.0} if method == "task_arithmetic" else {}
    made = {**recipe(folders, method, **given)}
    if method != "task_arithmetic":
        made["models"] = [{"model": str(f)} for f in folders[1:]]
    files = []
    for threads in (1, 5):
        out = tmp_path / str(threads)
        assert api.run_plan(mergekit.plan(made), out, RunOptions(threads=threads)) == []
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["arcee_fusion", *SPECTRAL])
def test_what_is_not_finite_shows(name):
    inputs = tensors((20, 30), 2)
    inputs[1][3, 4] = np.nan
    with pytest.raises(NonFiniteError):
        merge(name, inputs)


def test_plans_tell_time_and_memory(tmp_path):
    folders = family(tmp_path, 3, F32, {"w": (64, 64), "norm": (64,)})
    plain = mergekit.plan(recipe(folders, "task_arithmetic"))
    plan = mergekit.plan({**recipe(folders, "tsv_m"), "models": [{"model": str(f)} for f in folders[1:]]})
    assert whole_work.estimated_seconds(plain) == 0
    assert whole_work.estimated_seconds(plan) > 0
    assert whole_work.estimated_seconds(mergekit.plan(recipe(folders, "ties", svc=1.0))) > 0
    assert buffer_bytes(plan, 2) - buffer_bytes(plain, 2) >= 2 * 4 * 64 * 64 * (3 + 1 + 18)
    assert buffer_bytes(plan, 1) - buffer_bytes(plain, 1) >= 4 * 64 * 64 * (3 + 1 + 18)


def test_a_device_without_memory_is_a_fault_in_one_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(whole_work.WholeWork, "solve", fail)
    with pytest.raises(mergekit.errors.RunError, match="t is too large for 'iso_c' in the memory that there is"):
        merge("iso_c", tensors((20, 30)))


def test_other_devices_than_cuda_compute_on_the_processor():
    kernels = TorchKernels("cpu")
    assert whole_work._device(kernels).type == "cpu"
    kernels.device = torch.device("meta")
    assert whole_work._device(kernels).type == "cpu"


def test_methods_of_matrices_are_found_by_shape():
    assert [matrix_shape(s) for s in SHAPES[:5]] == [(1, 24, 41), (1, 41, 24), (3, 17, 23), (1, 7, 5), (1, 5, 24)]
    assert {matrix_shape(s) for s in SHAPES[5:]} == {None}
    assert matrix_shape((0, 3, 3)) is None
