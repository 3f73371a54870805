"""Breadcrumbs, DELLA and CABS, and the options of the sparse family, on both back ends against plain NumPy."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

import mergekit
import oracles
import sparse_oracles
from kernel_cases import BACK_ENDS, ArrayReader, ArraySink, back_end, merge_sparse, models_of, pack, stored32
from mergekit.dtypes import BF16, F16, F32
from mergekit.errors import UsageError
from mergekit.execute import sparse_work, work
from mergekit.execute.buffers import Buffers
from mergekit.execute.merge_work import merge_work
from mergekit.execute.sparse_work import SparseWork
from mergekit.execute.work import Job
from mergekit.kernels import cpu
from mergekit.kernels.accelerator import TorchKernels
from mergekit.kernels.philox import fill_random
from mergekit.kernels.ranks import SHORT_ROW
from mergekit.methods import GroupTop, KeepAll, ParameterError, RandomKeep, RankKeep, SparseMerge, get_method
from mergekit.planning.expression import Apply
from mergekit.planning.plan import OutputTensor
from mergekit.seeds import stream_key
from models import family

SEED = 5
SHAPES = [
    (),
    (1,),
    (7,),
    (2053,),
    (13, 1),
    (5, 1, 4),
    (3, 1031),
    (11, 300),
    (3, SHORT_ROW),
    (2, SHORT_ROW + 1),
    (2, 4, 521),
]


@pytest.fixture(params=BACK_ENDS)
def kernels(request):
    return back_end(request.param)


@pytest.fixture
def many_ranges(monkeypatch):
    """Small ranges, so that a few thousand elements make several."""
    monkeypatch.setattr(work, "RANGE", 1024)
    monkeypatch.setattr(work, "ALIGNMENT", 1024)


def shaped(kind: str, count: int, shape: tuple[int, ...]) -> list[np.ndarray]:
    return [m.reshape(shape) for m in models_of(kind, count, math.prod(shape))]


def kept(kernels, method: str, models: list[np.ndarray], **parameters) -> np.ndarray:
    """Which entries of one model a method keeps, where the model differs from the base."""
    shape = models[0].shape
    merged = merge_sparse(kernels, method, [m.reshape(-1) for m in models], shape=shape, seed=SEED, **parameters)
    return merged.reshape(shape) != models[0]


@pytest.mark.parametrize("kind", ["plain", "exact", "equal", "tiny", "same"])
@pytest.mark.usefixtures("many_ranges")
def test_breadcrumbs_keep_the_band_below_the_largest(kernels, kind):
    for size in (1, 2, 1021, 4099):
        base, model = models_of(kind, 2, size)
        for density, gamma in ((0.9, 0.01), (0.5, 0.0), (0.3, 0.2), (0.3, 0.9), (1e-5, 0.5), (0.99, 0.5), (1.0, 0.3)):
            mask = sparse_oracles.band(model - base, density, gamma)
            got = kept(kernels, "breadcrumbs", [base, model], density=(density,), gamma=(gamma,))
            assert np.array_equal(got, mask & (model != base)), (size, density, gamma)


@pytest.mark.usefixtures("many_ranges")
def test_bands_of_ties_hold_however_ranges_are_cut(kernels, monkeypatch):
    monkeypatch.setattr(work, "MOST_RANGES", 3)
    base, model = models_of("equal", 2, 7 * 1024 + 11)
    for (density, gamma), block in product(((0.2, 0.1), (0.2, 0.41), (0.6, 0.4)), (1024, 2048, None)):
        got = kept(kernels, "breadcrumbs", [base, model], density=(density,), gamma=(gamma,), block=block)
        skipped = min(int(gamma * len(base)), len(base) - int(density * len(base)))
        assert np.flatnonzero(got).tolist() == list(range(skipped, skipped + int(density * len(base))))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.usefixtures("many_ranges")
def test_bands_are_found_among_16_bit_numbers(kernels, dtype):
    models = [stored32(m, dtype) for m in models_of("plain", 3, 5003)]
    bands = ((0.6, 0.02), (0.3, 0.3))
    densities, gammas = zip(*bands, strict=True)
    merged = merge_sparse(kernels, "breadcrumbs", models, dtypes=[dtype] * 3, density=densities, gamma=gammas)
    deltas = [m - models[0] for m in models[1:]]
    masks = [sparse_oracles.band(d, *b) for d, b in zip(deltas, bands, strict=True)]
    wanted, _ = sparse_oracles.merge(models[0].astype(np.float64), deltas, masks, [1, 1])
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "exact", "equal"])
@pytest.mark.usefixtures("many_ranges")
def test_della_keeps_by_rank_in_the_row(kernels, kind, shape):
    base, model = shaped(kind, 2, shape)
    mask, _ = sparse_oracles.by_rank(model - base, 0.4, 0.3, stream_key(SEED, "t", 1))
    got = kept(kernels, "della_linear", [base, model], density=(0.4,), epsilon=(0.3,))
    assert np.array_equal(got, mask & (model != base))


@pytest.mark.usefixtures("many_ranges")
def test_della_masks_do_not_depend_on_ranges_or_blocks(kernels, monkeypatch):
    models = models_of("plain", 3, 37 * 331)
    options = {"density": (0.3, 0.6), "epsilon": (0.1, 0.2), "shape": (37, 331), "rescale": "l1"}
    whole = merge_sparse(kernels, "della", models, block=1024, **options)
    for block in (1, 5000, None):
        assert np.array_equal(merge_sparse(kernels, "della", models, block=block, **options), whole)
    monkeypatch.setattr(work, "RANGE", 1 << 21)
    assert np.array_equal(merge_sparse(kernels, "della", models, **options), whole)


@pytest.mark.usefixtures("many_ranges")
def test_masks_made_twice_are_those_that_were_kept(kernels, monkeypatch):
    models = models_of("plain", 3, 37 * 331)
    options = {"density": (0.3, 0.6), "epsilon": (0.1, 0.2), "shape": (37, 331), "rescale": "l1"}
    kept_masks = merge_sparse(kernels, "della", models, **options)
    monkeypatch.setattr(sparse_work, "_MASK_BYTES", 0)
    assert np.array_equal(merge_sparse(kernels, "della", models, **options), kept_masks)


def test_long_rows_are_ranked_too(kernels):
    random = np.random.default_rng(3)
    base = np.zeros((2, 40_000), np.float32)
    model = random.permuted(np.tile(np.arange(1, 40_001, dtype=np.float32), (2, 1)), axis=1)
    got = kept(kernels, "della_linear", [base, model], density=(0.5,), epsilon=(0.4,))
    chance = 0.1 + 0.8 * (model - 1) / 39_999
    assert np.array_equal(got, random_words(80_000).reshape(2, -1) < chance * 2**32)


def random_words(size: int) -> np.ndarray:
    """As the oracle's, which ``test_philox`` holds this generator against, but fast."""
    words = np.empty((-(-size // 1024), 1024), np.uint32)
    for i, group in enumerate(words):
        fill_random(i * 1024, *stream_key(SEED, "t", 1), group)
    return words.reshape(-1)[:size].astype(np.int64)


def test_dense_and_empty_della_draw_nothing(kernels):
    models = models_of("plain", 3, 1031)
    merged = merge_sparse(kernels, "della_linear", models, density=(1.0, 0.0), epsilon=(0.15, 0.15))
    np.testing.assert_allclose(merged, models[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.1, 0.15), (0.5, 0.5), (0.999, 0.001)])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_refuses_probabilities_outside_0_and_1_while_planning(tmp_path, method, density, epsilon):
    folders = family(tmp_path, 2, F32, {"w": (3, 5)})
    recipe = {"merge_method": method, "base_model": str(folders[0]), "models": [{"model": str(folders[1])}],
              "parameters": {"weight": 1, "density": density, "epsilon": epsilon}}  # fmt: skip
    with pytest.raises(UsageError, match=f"density {density:g} with epsilon {epsilon:g}"):
        mergekit.plan(recipe)


@pytest.mark.parametrize("kind", ["plain", "exact", "equal", "same"])
@pytest.mark.usefixtures("many_ranges")
def test_cabs_masks_are_disjoint_and_balanced(kernels, kind):
    for size, m in product((1, 7, 1021, 4099), (1, 4, 250, 8192)):
        models = models_of(kind, 4, size)
        deltas = [d - models[0] for d in models[1:]]
        for n in ((m // 4, m // 2, m // 2), (m, m, 0), (0, 1, 1)):
            masks = sparse_oracles.groups(deltas, n, m)
            assert (np.sum(masks, axis=0) <= 1).all()
            merged = merge_sparse(kernels, "cabs", models, weight=(1.0, 0.5, -2.0), n=n, m=m)
            wanted, _ = sparse_oracles.merge(models[0].astype(np.float64), deltas, masks, [1.0, 0.5, -2.0])
            np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-6, err_msg=str((size, m, n)))


def test_cabs_refuses_groups_that_are_too_small(tmp_path):
    folders = family(tmp_path, 2, F32, {"w": (3, 5)})
    recipe = {"merge_method": "cabs", "base_model": str(folders[0]), "models": [{"model": str(folders[1])}],
              "parameters": {"weight": 1, "n": 9, "m": 8}}  # fmt: skip
    with pytest.raises(UsageError, match="n is 9 and m is 8"):
        mergekit.plan(recipe)


FAMILY = {
    "ties": {},
    "dare_ties": {},
    "dare_linear": {},
    "breadcrumbs": {"gamma": (0.1, 0.05, 0.2)},
    "breadcrumbs_ties": {"gamma": (0.1, 0.05, 0.2)},
    "della": {"epsilon": (0.1, 0.05, 0.2)},
    "della_linear": {"epsilon": (0.1, 0.05, 0.2)},
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rescale", ["none", "l1", "density"])
@pytest.mark.parametrize("elect", ["weighted", "unweighted"])
@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.usefixtures("many_ranges")
def test_family_matches_its_formula(kernels, method, normalize, rescale, elect):
    shape, weight, density, own = (7, 443), [0.75, -0.5, 1.25], [0.4, 1.0, 0.6], FAMILY[method]
    consensus = "elect" in [p.name for p in get_method(method).params]
    if elect == "unweighted" and not consensus:
        pytest.skip("elects no signs")
    models = shaped("plain", 4, shape)
    deltas = [m - models[0] for m in models[1:]]
    masks, shares = [], []
    for i, (delta, share) in enumerate(zip(deltas, density, strict=True)):
        key = stream_key(SEED, "t", i + 1)
        chance: float | np.ndarray = share
        if method == "ties":
            mask = oracles.top_magnitude(delta, share)
        elif "gamma" in own:
            mask = sparse_oracles.band(delta, share, own["gamma"][i])
        elif "epsilon" in own:
            mask, chance = sparse_oracles.by_rank(delta, share, own["epsilon"][i], key)
        else:
            mask = oracles.random_mask(shape, share, key)
        masks.append(mask)
        shares.append(mask.mean() if method.startswith(("ties", "bread")) else chance)
    options = {"normalize": normalize, "rescale": rescale, **({"elect": elect} if consensus else {})}
    merged = merge_sparse(
        kernels, method, [m.reshape(-1) for m in models], shape=shape, weight=tuple(weight), density=tuple(density),
        lambda_=0.5, **own, **options,
    ).reshape(shape)  # fmt: skip
    wanted, votes = sparse_oracles.merge(
        models[0].astype(np.float64), deltas, masks, weight, shares=shares, consensus=consensus, factor=0.5, **options
    )
    sure = votes > 1e-6 if consensus else np.ones(shape, bool)
    sure |= ~np.any(masks, axis=0)
    assert sure.mean() > 0.99
    np.testing.assert_allclose(merged[sure], wanted[sure], rtol=0, atol=3e-6)


def test_flags_of_old_recipes_still_mean_what_they_did():
    rescale = get_method("dare_ties").parameter("rescale")
    assert rescale is not None
    assert [rescale.kind.read(v) for v in (False, True, "density")] == ["none", "l1", "density"]
    defaults = {m: get_method(m).parameter("rescale").default for m in FAMILY}  # type: ignore[union-attr]
    assert [m for m, word in defaults.items() if word == "l1"] == ["dare_ties", "dare_linear", "della", "della_linear"]
    assert [m for m in FAMILY if get_method(m).parameter("normalize").default] == ["ties", "della"]  # type: ignore[union-attr]


def figures(method: str, models: list[np.ndarray], **parameters) -> dict:
    """The statistics of a merge of arrays."""
    size, found = models[0].size, {}
    apply = Apply(method, (), tuple(range(len(models))), True, tuple(parameters.items()))
    output = OutputTensor("t", models[0].shape, F32, "model.safetensors", 0, size * 4, apply)
    sink = ArraySink(size * 4)
    sink.finish = lambda output, checksum, figures: found.update(figures)  # type: ignore[method-assign, assignment]
    readers = tuple(ArrayReader(m.reshape(-1), F32) for m in models)
    job = merge_work(apply, Job(output, readers, cpu, sink, statistics=True, seed=SEED))
    for phase in range(job.phases):
        for index in range(len(job.ranges)):
            job.run(phase, index, Buffers())
        job.reduce(phase)
    return found


COMMON = {"weight": (1.0, 1.0), "density": (0.3, 0.7), "normalize": False, "lambda_": 1.0}


@pytest.mark.parametrize("rescale", ["none", "l1", "density"])
@pytest.mark.parametrize(("method", "own"), [("ties", {}), ("breadcrumbs", {"gamma": (0.1, 0.1)})])
def test_kept_shares_of_magnitudes_are_exact(method, own, rescale):
    models = shaped("equal", 3, (7, 443))
    found = figures(method, models, rescale=rescale, **own, **COMMON)
    assert found["kept"] == [float(f"{int(d * 3101) / 3101:.6g}") for d in (0.3, 0.7)]
    assert found["exact"] == "all" or "kept" in found["exact"]


@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize(("method", "own"), [("dare_linear", {}), ("della_linear", {"epsilon": (0.1, 0.1)})])
def test_kept_shares_of_random_masks_are_counted(method, own, rescale):
    shape = (1231, 443)  # large enough to be sampled
    models = shaped("plain", 3, shape)
    found = figures(method, models, rescale=rescale, **own, **COMMON)
    assert ("kept" in found["exact"]) == (rescale == "l1")
    for share, density in zip(found["kept"], (0.3, 0.7), strict=True):
        assert abs(share - density) < (0.005 if rescale == "l1" else 0.02)


def test_kept_shares_of_groups_are_known():
    size = 256 * 3 + 100
    models = [m.reshape(-1) for m in models_of("plain", 4, size)]
    found = figures("cabs", models, weight=(1.0,) * 3, n=(128, 64, 100), m=256, lambda_=1.0)
    counts = [
        int(mask.sum()) for mask in sparse_oracles.groups([m - models[0] for m in models[1:]], (128, 64, 100), 256)
    ]
    assert found["kept"] == [float(f"{c / size:.6g}") for c in counts]


def test_counting_does_not_use_up_quotas():
    models = models_of("equal", 3, 4099)
    quiet = merge_sparse(cpu, "ties", models, density=(0.3, 0.7))
    found = figures("ties", models, rescale="none", **COMMON)
    assert found["kept"] == [float(f"{int(d * 4099) / 4099:.6g}") for d in (0.3, 0.7)]
    assert (quiet != models[0]).sum() == int(0.7 * 4099)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_gains_are_the_same_on_both_back_ends(dtype):
    twin = TorchKernels("cpu")
    for row, rows, index in ((1, 40, 0), (3, 341, 3 * 5000), (100, 11, 0), (1031, 3, 1031 * 8), (4099, 1, 0)):
        count = row * rows
        for kind in ("plain", "exact", "narrow"):
            models = models_of("plain" if kind == "narrow" else kind, 3, count)
            if kind == "narrow":  # all magnitudes in one bin of the histogram: rows must be sorted
                models = [np.zeros(count, np.float32), *(np.float32(1 + np.abs(d) * 2**-9) for d in models[1:])]
            raw, codes = pack(models, [F32, dtype, dtype])
            wanted, keys = np.array([False, True, True]), np.array([(0, 0), (1, 2), (3, 4)], np.uint32)
            lows, spans = np.array([0, 1 << 30, 1 << 31]), np.array([0, 1 << 31, 0])
            for by_chance in (False, True):
                gains = [np.full((3, count), -1, np.float32) for _ in range(2)]
                for kernels, gain in zip((cpu, twin), gains, strict=True):
                    kernels.rank_gains(raw, codes, 0, wanted, lows, spans, keys, row, by_chance, index, count,
                                       np.empty((2, row), np.uint64), gain)  # fmt: skip
                assert np.array_equal(gains[0], gains[1])
                assert (gains[0][0] == -1).all()
            gains = [np.full((3, count), -1, np.float32) for _ in range(2)]
            for kernels, gain in zip((cpu, twin), gains, strict=True):
                kernels.group_gains(raw, codes, 0, wanted, np.array([0, row // 2, 1]), row, count, gain)
            assert np.array_equal(gains[0], gains[1])


@pytest.mark.parametrize("place", [0, 1])
def test_faulty_entries_that_are_kept_show(kernels, place):
    models = models_of("plain", 2, 1031)
    models[place][::3] = np.nan
    for method, options in (("della_linear", {"epsilon": (0.1,), "density": (0.5,)}), ("cabs", {"n": (64,), "m": 256})):
        apply = Apply(method, (), (0, 1), True, tuple({**options, "weight": (1.0,), "lambda_": 1.0, **(
            {"normalize": False, "rescale": "none"} if "density" in options else {})}.items()))  # fmt: skip
        output = OutputTensor("t", (1031,), F32, "model.safetensors", 0, 1031 * 4, apply)
        sink = ArraySink(1031 * 4)
        readers = tuple(ArrayReader(m, F32) for m in models)
        job = merge_work(apply, Job(output, readers, kernels, sink, allow_nonfinite=True, seed=SEED))
        for phase in range(job.phases):
            job.run(phase, 0, Buffers())
            job.reduce(phase)
        assert sink.notes


def test_random_rules_beside_ranks_keep_their_masks(kernels):
    """A merge may mix rules; the mask of a random one is the documented one whatever stands beside it."""
    models = models_of("exact", 3, 7 * 331)
    apply = Apply("mixed", (), (0, 1, 2), True, ())
    output = OutputTensor("t", (7, 331), F32, "model.safetensors", 0, models[0].size * 4, apply)
    rules = (RandomKeep(0.3), RankKeep(0.5, 0.2))
    method = get_method("della_linear")
    sink = ArraySink(models[0].size * 4)
    mixed = SparseMerge(rules, (1.0, 0.0), False, False, "none", 1.0)
    with pytest.MonkeyPatch.context() as patch:
        fake = type(method)(**{**{f: getattr(method, f) for f in method.__slots__}, "function": lambda: mixed})
        patch.setattr("mergekit.execute.sparse_work.get_method", lambda name: fake)
        patch.setattr("mergekit.execute.float_work.get_method", lambda name: fake)
        job = SparseWork(apply, Job(output, tuple(ArrayReader(m, F32) for m in models), kernels, sink, seed=SEED))
        for phase in range(job.phases):
            job.run(phase, 0, Buffers())
            job.reduce(phase)
    mask = oracles.random_mask((models[0].size,), 0.3, stream_key(SEED, "t", 1))
    assert np.array_equal(sink.data.view(np.float32), np.where(mask, models[1], models[0]))


def test_rules_that_cannot_be_followed_together_are_refused():
    for rules in ((GroupTop(1, 4), GroupTop(1, 8)), (GroupTop(1, 4), RankKeep(0.5, 0.1))):
        with pytest.raises(ParameterError, match="can't mix"):
            SparseMerge(rules, (1.0, 1.0), False, False, "none", 1.0)
    SparseMerge((GroupTop(1, 4), KeepAll()), (1.0, 1.0), False, False, "none", 1.0)


def test_memory_for_whole_rows_is_declared():
    def held(shape: tuple[int, ...]) -> int:
        values = {"normalize": True, "rescale": "l1", "lambda_": 1.0, "density": (0.5,), "epsilon": (0.1,)}
        return SparseWork.held(Apply("della", (), (0, 1), True, (("weight", (1.0,)), *values.items())), shape, 2)

    assert held((4096, 4096)) < 64 << 20
    assert held((100_000_000,)) > 1_600_000_000
