"""The torch back end against the CPU kernels: kernel by kernel on the same bytes, then whole merges."""

from __future__ import annotations

import inspect
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import mergekit
from kernel_cases import FLOATS, TORCH_DEVICES, models_of, pack, unpack
from mergekit import api
from mergekit.api import RunOptions
from mergekit.dtypes import BF16, F16, F32, F64, DType
from mergekit.errors import RunError, UsageError
from mergekit.execute import work
from mergekit.kernels import cpu
from mergekit.kernels.accelerator import TorchKernels
from models import family, read_model

SIZES = [1, 7, 1021, 1024, 4099]
METHODS = ["linear", "slerp", "task_arithmetic", "ties", "dare_ties", "dare_linear", "passthrough"]
WEIGHTS = np.array([0.3, -0.7, 1.1, 0.45], np.float32)
SHAPES = {"embed.weight": (211, 31), "layers.0.w": (127, 97), "layers.1.w": (127, 97), "norm": (17,), "one": ()}


@pytest.fixture(params=TORCH_DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture
def twin(device) -> TorchKernels:
    return TorchKernels(device)


def buffers(count: int, size: int, kind: str = "plain", dtypes: tuple[DType, ...] = FLOATS) -> tuple:
    """``raw`` and ``codes`` of ``count`` models whose types take turns."""
    return pack(models_of(kind, count, size), [dtypes[m % len(dtypes)] for m in range(count)])


def both(twin: TorchKernels, name: str, size: int, out: DType, *arguments) -> None:
    """Run a kernel that writes elements on both back ends: same flag, same values.

    On the processor the bits are the same (NaN by NaN); elsewhere one unit in the last place is allowed.
    """
    results, flags = [], []
    for kernels in (cpu, twin):
        target = np.full((size + 3) * out.size, 0xCD, np.uint8)
        own = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        flags.append(bool(getattr(kernels, name)(*own, size, target, cpu.CODES[out])))
        assert (target[size * out.size :] == 0xCD).all(), "written beyond the end"
        results.append(unpack(target, out, size))
    assert flags[0] == flags[1]
    check_close(results[1], results[0], out, exact=twin.device.type == "cpu")


def check_close(got: np.ndarray, wanted: np.ndarray, dtype: DType, *, exact: bool = False) -> None:
    """Equal, or within one unit in the last place of the 16-bit types, 1e-6 of the wider ones, 1e-6 of the largest."""
    if exact:
        assert np.array_equal(got, wanted, equal_nan=True)
    else:
        unit, finite = {BF16: 2.0**-7, F16: 2.0**-10}.get(dtype, 1e-6), abs(wanted[np.isfinite(wanted)])
        np.testing.assert_allclose(got, wanted, rtol=unit, atol=1e-6 * finite.max(initial=0))


def sparse_arguments(count: int, size: int, first: int, index: int) -> tuple[np.ndarray, ...]:
    """Rules, thresholds, quotas, chances, keys and gains: every rule, the first at model ``first``."""
    rules = np.array([(m + first) % 6 for m in range(count)], np.int64)
    deltas = models_of("exact", count, size)
    ordered = [np.sort(np.abs(d - deltas[0])) for d in deltas]
    thresholds = [[o[int(size * share)].view(np.uint32) for o in ordered] for share in (0.5, 0.9)]
    random = np.random.default_rng([count, size, index])
    return (
        rules,
        np.array(thresholds, np.uint32),
        random.integers(0, size, (2, count)) // np.array([[1], [8]]),
        random.integers(0, 1 << 32, count, np.uint32),
        random.integers(0, 1 << 32, (count, 2), np.uint32),
        random.choice(np.array([0, 1, 1.75], np.float32), (count, size)),
    )


def test_every_name_of_the_cpu_back_end_is_there():
    twin = TorchKernels("cpu")
    for name in cpu.__all__:
        mine, theirs = getattr(twin, name), getattr(cpu, name)
        if not callable(theirs):
            assert mine == theirs, name
            continue
        wanted = inspect.signature(getattr(theirs, "py_func", theirs))
        assert list(inspect.signature(mine).parameters) == list(wanted.parameters), name


@pytest.mark.parametrize("out", FLOATS)
def test_weighted_sums_are_the_same(twin, out):
    for size, count in product(SIZES, (1, 2, 4)):
        raw, codes = buffers(count, size)
        both(twin, "weighted_sum", size, out, raw, codes, WEIGHTS[:count])
        for base in {0, count - 1}:
            both(twin, "weighted_delta_sum", size, out, raw, codes, WEIGHTS[:count], base)


@pytest.mark.parametrize("out", FLOATS)
def test_special_values_come_out_the_same(twin, out):
    values = models_of("plain", 1, 1031)[0]
    for value, factor in product([np.nan, np.inf, -np.inf, 65519.0, 65520.0, 3.39e38, 3.4e38, 1e-41], (1.0, -1.0)):
        values[1021] = value
        raw, codes = pack([values], [F32])
        both(twin, "weighted_sum", 1031, out, raw, codes, np.array([factor], np.float32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_stay_unchanged(twin, dtype):
    raw, codes = buffers(3, 1021, dtypes=(dtype,))
    before, out = raw.copy(), np.empty(1021 * 8, np.uint8)
    twin.weighted_sum(raw, codes, WEIGHTS[:3], 1021, out, 3)
    twin.weighted_delta_sum(raw, codes, WEIGHTS[:3], 0, 1021, out, 3)
    twin.gram(raw, codes, 0, 1021, np.zeros((3, 3)))
    arguments = sparse_arguments(3, 1021, 0, 0)
    twin.sparse_sum(raw, codes, 0, *arguments, WEIGHTS[:3], WEIGHTS[:3], 1, True, np.float32(1), 0, 1021, out, 3)
    assert np.array_equal(raw, before)


@pytest.mark.parametrize("base", [-1, 0, 2])
def test_gram_matrices_agree(twin, base):
    for size in SIZES:
        raw, codes = buffers(3, size)
        totals = [np.zeros((3, 3)) for _ in range(2)]
        for kernels, total in zip((cpu, twin), totals, strict=True):
            for _ in range(2):  # sums add up
                kernels.gram(raw, codes, base, size, total)
        norms = np.sqrt(np.diag(totals[0]))
        assert (abs(totals[1] - totals[0]) <= 1e-6 * np.outer(norms, norms)).all(), size
        assert np.array_equal(totals[1] != 0, totals[0] != 0)


@pytest.mark.parametrize("kind", ["plain", "exact", "same"])
def test_histograms_are_the_same(twin, kind):
    wanted = np.array([False, True, False, True])
    for size in SIZES:
        raw, codes = buffers(4, size, kind, (BF16, F32))
        coarse = [np.zeros((4, cpu.COARSE_BINS), np.int64) for _ in range(2)]
        fine = [np.zeros((4, cpu.FINE_BINS), np.uint32) for _ in range(2)]
        for kernels, upper, lower in zip((cpu, twin), coarse, fine, strict=True):
            kernels.coarse_histogram(raw, codes, 0, wanted, size, upper)
            kernels.fine_histogram(raw, codes, 0, wanted, coarse[0].argmax(axis=1), size, lower)
        assert np.array_equal(coarse[0], coarse[1])
        assert np.array_equal(fine[0], fine[1])
        assert fine[0].any(axis=1).tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", ["plain", "exact", "same"])
def test_kept_norms_and_quotas_agree(twin, kind):
    for size, index, first in product(SIZES, (0, 5 * 1024, 2**34 - 1024), range(6)):
        raw, codes = buffers(4, size, kind, (F32, BF16))
        rules, thresholds, quota, *others = sparse_arguments(4, size, first, index)
        norms, quotas = [np.zeros((4, 3)) for _ in range(2)], [quota.copy() for _ in range(2)]
        wanted = np.array([False, True, True, True])
        for kernels, norm, left in zip((cpu, twin), norms, quotas, strict=True):
            kernels.kept_norms(raw, codes, 0, wanted, rules, thresholds, left, *others, 4096, index, size, norm)
        assert np.array_equal(quotas[0], quotas[1])
        np.testing.assert_allclose(norms[1], norms[0], rtol=1e-6)
        assert np.array_equal(norms[1][:, 2], norms[0][:, 2])


@pytest.mark.parametrize("elect", [cpu.ELECT_NONE, cpu.ELECT_WEIGHTED, cpu.ELECT_UNWEIGHTED])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["plain", "exact"])
def test_sparse_sums_are_the_same(twin, kind, elect, normalize):
    cases = ((0, BF16, 0), (1, F32, 7 * 1024), (2, F16, 2**34), (3, F64, 1024), (4, F32, 0))
    for size, count, (first, out, index) in product(SIZES, (2, 4), cases):
        raw, codes = buffers(count, size, kind, (F32, BF16, F16, F64))
        scales = np.array([1.0, 1.5, 0.9, 2.0], np.float32)[:count]
        rest = (WEIGHTS[:count], scales, elect, normalize, np.float32(0.7), index)
        both(twin, "sparse_sum", size, out, raw, codes, 0, *sparse_arguments(count, size, first, index), *rest)


@pytest.mark.parametrize("elect", [cpu.ELECT_NONE, cpu.ELECT_WEIGHTED])
def test_faulty_inputs_come_out_the_same(twin, elect):
    for place, fault, out in product(range(3), (np.nan, np.inf, -np.inf), (BF16, F32)):
        models = models_of("exact", 3, 1031)
        models[place][::7] = fault
        raw, codes = pack(models, [F32] * 3)
        arguments = sparse_arguments(3, 1031, 5, 0)
        rest = (WEIGHTS[:3], np.ones(3, np.float32), elect, True, np.float32(1), 0)
        both(twin, "sparse_sum", 1031, out, raw, codes, 0, *arguments, *rest)


def test_faulty_inputs_show_in_sums(twin):
    for fault in (np.nan, np.inf):
        models = models_of("exact", 3, 4099)
        models[1][5], models[1][2053] = fault, -fault
        raw, codes = pack(models, [F32] * 3)
        totals, norms, arguments = np.zeros((3, 3)), np.zeros((3, 3)), sparse_arguments(3, 4099, 5, 0)
        twin.gram(raw, codes, 0, 4099, totals)
        assert np.isfinite(totals).tolist() == [[True] * 3, [True, False, False], [True] * 3]
        twin.kept_norms(raw, codes, 0, np.array([False, True, True]), *arguments, 4096, 0, 4099, norms)
        assert np.isfinite(norms).tolist() == [[True] * 3, [False, False, True], [True] * 3]


def test_ties_take_their_turn(twin):
    base, model = models_of("equal", 2, 1021)
    raw, codes = pack([base, model], [F32, F32])
    thresholds = np.array([[0, (model - base)[0].view(np.uint32)]] * 2, np.uint32)
    rules, zeros, ones = np.full(2, cpu.KEEP_TOP, np.int64), np.zeros(2, np.uint32), np.ones(2, np.float32)
    for quota in (0, 1, 500, 1020, 1021, 4000):
        left, out = np.array([[0, quota], [0, 0]], np.int64), np.empty(1021 * 4, np.uint8)
        twin.sparse_sum(raw, codes, 0, rules, thresholds, left, zeros, np.zeros((2, 2), np.uint32),
                        np.zeros((2, 0), np.float32), ones, ones, cpu.ELECT_NONE, False, np.float32(1), 0, 1021, out,
                        cpu.CODES[F32])  # fmt: skip
        kept = unpack(out, F32, 1021) == model
        assert kept.tolist() == [place < quota for place in range(1021)]
        assert left[0, 1] == max(0, quota - 1021)


@pytest.mark.parametrize("dtype", FLOATS)
def test_checks_of_copies_are_the_same(twin, dtype):
    values = models_of("plain", 1, 2053)[0]
    raw, codes = pack([values], [dtype])
    for place, fault in ((None, 0), (0, np.nan), (2052, np.inf), (1024, -np.inf)):
        if place is not None:
            values[place] = fault
            raw, codes = pack([values], [dtype])
        finite = [bool(kernels.all_finite(raw[0], codes[0], 2053)) for kernels in (cpu, twin)]
        assert finite == [place is None] * 2
    assert twin.checksum(raw[0], 64) == cpu.checksum(raw[0], 64)


def test_float64_beyond_float32_counts_as_finite(twin):
    assert twin.all_finite(np.array([1e300, -1e300]).view(np.uint8), cpu.CODES[F64], 2)


def recipe_for(method: str, folders: list[Path], dtype: DType) -> dict:
    if method == "passthrough":
        model = {"model": str(folders[0]), "parameters": {"scale": 0.7}}
        return {"merge_method": method, "dtype": dtype.name, "models": [model]}
    others = folders[1:2] if method == "slerp" else folders[1:]
    models = [{"model": str(f), "parameters": {"weight": 0.6 - i, "density": 0.4}} for i, f in enumerate(others)]
    base = {"model": str(folders[0]), "parameters": {"weight": 0.1}}
    parameters = {"t": [0.2, 0.8], "rescale": True, "normalize": False}
    return {"merge_method": method, "dtype": dtype.name, "base_model": str(folders[0]), "models": [base, *models],
            "parameters": parameters}  # fmt: skip


def merged(recipe: dict, out: Path, device: str) -> dict[str, np.ndarray]:
    plan = mergekit.plan(recipe, RunOptions(device=device))
    assert plan.device == device
    assert api.run_plan(plan, out, RunOptions(device=device, threads=1)) == []
    return read_model(out)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("method", METHODS)
def test_whole_merges_agree(tmp_path, monkeypatch, method, dtype, device):
    monkeypatch.setattr(work, "RANGE", 1 << 11)  # several ranges a tensor
    monkeypatch.setattr(work, "ALIGNMENT", 1024)
    folders = family(tmp_path, 3, BF16, SHAPES)
    recipe = recipe_for(method, folders, dtype)
    wanted = merged(recipe, tmp_path / "numba", "cpu")
    got = merged(recipe, tmp_path / "torch", "cpu:0" if device == "cpu" else device)
    base = read_model(folders[0])
    assert list(got) == list(wanted) == list(SHAPES)
    for name in SHAPES:
        check_close(got[name], wanted[name], dtype)
        if dtype == F32 and method in ("ties", "dare_ties", "dare_linear"):
            assert np.array_equal(got[name] != base[name], wanted[name] != base[name]), "masks differ"
            assert name in ("norm", "one") or 0.1 < np.mean(got[name] == base[name]) < 0.9


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_ties"])
def test_block_size_does_not_change_a_byte(tmp_path, monkeypatch, method):
    recipe = recipe_for(method, family(tmp_path, 3, BF16, SHAPES), BF16)
    kernels = TorchKernels("cpu")
    monkeypatch.setattr("mergekit.api.run.kernels_for", lambda plan, on_compile: kernels)
    monkeypatch.setattr(work, "_LEAST_BLOCK", 1024)
    monkeypatch.setattr(work, "ALIGNMENT", 1024)
    files = []
    for block_bytes in (1 << 10, 1 << 17, 1 << 30):
        kernels.block_bytes = block_bytes
        merged(recipe, tmp_path / str(block_bytes), "cpu:0")
        files.append((tmp_path / str(block_bytes) / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("name", ["nonsense", "cuda", "mps", "xpu"])
def test_a_device_that_is_not_there_is_refused(name):
    available = {"cuda": torch.cuda, "mps": torch.mps, "xpu": torch.xpu}.get(name)
    if available is not None and available.is_available():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(UsageError, match=f"can't compute on '{name}' here .*use --device cpu"):
        TorchKernels(name)


def test_a_device_without_memory_is_a_fault_in_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    twin = TorchKernels("cpu")
    monkeypatch.setattr(twin, "_load", fail)
    raw, codes = buffers(2, 7)
    with pytest.raises(RunError, match="the device is out of memory; free some of it, or use --device cpu"):
        twin.gram(raw, codes, -1, 7, np.zeros((2, 2)))
