"""The sparse kernels on both back ends against plain NumPy: exact k-th magnitudes, ties, keep rules, consensus."""

from __future__ import annotations

import numpy as np
import pytest

import oracles
from kernel_cases import BACK_ENDS, back_end, merge_sparse, models_of, pack, stored32, unpack
from mergekit.dtypes import BF16, F16, F32, F64
from mergekit.execute import work
from mergekit.seeds import stream_key

ONES = np.ones(3, np.float32)
NO_GAINS = np.zeros((4, 0), np.float32)


@pytest.fixture(params=BACK_ENDS)
def kernels(request):
    return back_end(request.param)


@pytest.fixture
def many_ranges(monkeypatch):
    """Ranges of 1,024 elements, a group of the kernels, so that a few thousand elements make several."""
    monkeypatch.setattr(work, "RANGE", 1024)
    monkeypatch.setattr(work, "ALIGNMENT", 1024)


def magnitudes(models: list[np.ndarray]) -> list[np.ndarray]:
    """The bits of |delta| of every model but the base."""
    return [(m - models[0]).view(np.uint32) & 0x7FFFFFFF for m in models[1:]]


@pytest.mark.parametrize("kind", ["plain", "exact", "equal", "same", "tiny"])
@pytest.mark.parametrize("size", [1, 4099])
def test_histograms_count_every_delta_once(kernels, kind, size):
    models = models_of(kind, 3, size)
    raw, codes = pack(models, [F32] * 3)
    bits = magnitudes(models)
    wanted = np.array([False, True, True])
    coarse = np.zeros((3, kernels.COARSE_BINS), np.int64)
    for _ in range(2):  # counts add up
        kernels.coarse_histogram(raw, codes, 0, wanted, size, coarse)
    assert not coarse[0].any()
    for m in (1, 2):
        assert np.array_equal(coarse[m], 2 * np.bincount(bits[m - 1] >> 16, minlength=kernels.COARSE_BINS))
    bins = np.array([0, bits[0][0] >> 16, bits[1][-1] >> 16], np.int64)
    fine = np.zeros((3, kernels.FINE_BINS), np.uint32)
    for _ in range(2):
        kernels.fine_histogram(raw, codes, 0, wanted, bins, size, fine)
    assert not fine[0].any()
    for m in (1, 2):
        inside = bits[m - 1][bits[m - 1] >> 16 == bins[m]] & 0xFFFF
        assert np.array_equal(fine[m], 2 * np.bincount(inside, minlength=kernels.FINE_BINS))


@pytest.mark.parametrize("kind", ["exact", "equal", "tiny"])
@pytest.mark.usefixtures("many_ranges")
def test_exactly_the_largest_are_kept_and_of_ties_the_first(kernels, kind):
    for size in (1, 2, 1021, 4099):
        base, model = models_of(kind, 2, size)
        for density in (1e-6, 0.1, 0.37, 0.9, 0.9999):
            merged = merge_sparse(kernels, "ties", [base, model], density=(density,))
            mask = oracles.top_magnitude(model - base, density)
            assert np.array_equal(merged, np.where(mask, model, base).astype(np.float64)), (size, density)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.usefixtures("many_ranges")
def test_the_largest_are_found_among_16_bit_numbers(kernels, dtype):
    models = [stored32(m, dtype) for m in models_of("plain", 2, 5003)]
    merged = merge_sparse(kernels, "ties", models, dtypes=[dtype] * 2, density=(0.2,))
    mask = oracles.top_magnitude(models[1] - models[0], 0.2)
    assert np.array_equal(merged != models[0], mask & (models[1] != models[0]))
    np.testing.assert_allclose(merged, np.where(mask, models[1], models[0]), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("many_ranges")
def test_quotas_hold_however_ranges_are_cut(kernels, monkeypatch):
    monkeypatch.setattr(work, "MOST_RANGES", 3)
    base, model = models_of("equal", 2, 7 * 1024 + 11)
    for density, block in ((0.01, 1024), (0.45, 1024), (0.45, 2048), (0.99, None)):
        merged = merge_sparse(kernels, "ties", [base, model], density=(density,), block=block)
        assert int(np.flatnonzero(merged == model)[-1]) + 1 == (merged == model).sum() == int(density * len(base))


def test_density_zero_leaves_the_base(kernels):
    models = models_of("plain", 3, 1031)
    merged = merge_sparse(kernels, "ties", models, density=(0.0, -1.0))
    assert np.array_equal(merged, models[0].astype(np.float64))


def test_an_empty_tensor_is_nothing(kernels):
    assert merge_sparse(kernels, "ties", models_of("plain", 3, 0), density=(0.5, 0.5)).size == 0


def test_random_masks_are_the_documented_ones(kernels):
    base, model, other = models_of("exact", 3, 2 * 1024 + 37)
    merged = merge_sparse(kernels, "dare_linear", [base, model, other], density=(0.3, 0.8), weight=(1.0, 0.0), seed=11)
    mask = oracles.random_mask(base.shape, 0.3, stream_key(11, "t", 1))
    assert np.array_equal(merged, np.where(mask, model, base).astype(np.float64))


def test_random_keeps_what_lies_below_its_chance(kernels):
    base, model = np.zeros(1021, np.float32), np.ones(1021, np.float32)
    raw, codes = pack([base, model], [F32, F32])
    chance = oracles.philox((3, 0, 0, 0), (8, 9))[0]  # the number of element 3: not below itself
    for step in (0, 1):
        totals, quota = np.zeros((2, 3)), np.zeros((2, 2), np.int64)
        rules, chances = np.full(2, kernels.KEEP_RANDOM, np.int64), np.full(2, chance + step, np.uint32)
        kernels.kept_norms(raw, codes, 0, np.array([False, True]), rules, np.zeros((2, 2), np.uint32), quota, chances,
                           np.full((2, 2), (8, 9), np.uint32), NO_GAINS[:2], 4096, 0, 1021, totals)  # fmt: skip
        assert totals[1, 1] == totals[1, 2] == oracles.random_mask((1021,), (chance + step) / 2**32, (8, 9)).sum()


@pytest.mark.usefixtures("many_ranges")
def test_random_masks_do_not_depend_on_ranges_or_blocks(kernels, monkeypatch):
    models = models_of("plain", 3, 6 * 1024 + 7)
    whole = merge_sparse(kernels, "dare_ties", models, density=(0.3, 0.6), block=1024)
    monkeypatch.setattr(work, "RANGE", 1 << 21)
    assert np.array_equal(merge_sparse(kernels, "dare_ties", models, density=(0.3, 0.6)), whole)


@pytest.mark.parametrize(("dtype", "size"), [(F32, 1), (F64, 1024), (BF16, 3 * 1024 + 5)])
def test_kept_norms_are_l1_norms(kernels, dtype, size):
    models = [stored32(m, dtype) for m in models_of("plain", 4, size)]
    raw, codes = pack(models, [dtype] * 4)
    deltas = [m - models[0] for m in models]
    rules = np.array([kernels.KEEP_ALL, kernels.KEEP_TOP, kernels.KEEP_RANDOM, kernels.KEEP_ALL], np.int64)
    wanted = np.array([False, True, True, False])
    threshold = np.sort(np.abs(deltas[1]))[size // 3].view(np.uint32)
    keys = np.array([(0, 0), (1, 2), (3, 4), (5, 6)], np.uint32)
    totals = np.ones((4, 3))
    kernels.kept_norms(
        raw, codes, 0, wanted, rules, np.array([[0, threshold, 0, 0]] * 2, np.uint32), np.full((2, 4), size, np.int64),
        np.full(4, 1 << 31, np.uint32), keys, NO_GAINS, 4096, 0, size, totals,
    )  # fmt: skip
    exact = [np.abs(d).astype(np.float64) for d in deltas]
    masks = [exact[1] >= np.float64(threshold.view(np.float32)), oracles.random_mask((size,), 0.5, (3, 4))]
    assert (totals[[0, 3]] == 1).all()
    for m, mask in zip((1, 2), masks, strict=True):
        wanted_totals = [exact[m].sum(), exact[m][mask].sum(), mask.sum()]
        np.testing.assert_allclose(totals[m] - 1, wanted_totals, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
@pytest.mark.usefixtures("many_ranges")
def test_family_matches_its_formula(kernels, method, normalize, rescale):
    size, weight, density = 3 * 1024 + 13, [0.75, -0.5, 1.25], [0.4, 1.0, 0.6]
    models, consensus = models_of("exact", 4, size), method != "dare_linear"
    deltas = [m - models[0] for m in models[1:]]
    if method == "ties":
        masks = [oracles.top_magnitude(d, share) for d, share in zip(deltas, density, strict=True)]
    else:
        masks = [oracles.random_mask((size,), share, stream_key(5, "t", m)) for m, share in enumerate(density, 1)]
    options = {"normalize": normalize, "rescale": rescale}
    merged = merge_sparse(kernels, method, models, weight=tuple(weight), density=tuple(density), lambda_=0.5, **options)
    wanted = oracles.sparse(
        models[0].astype(np.float64), deltas, masks, weight, consensus=consensus, factor=0.5, normalize=normalize,
        rescale=rescale == "l1",
    )  # fmt: skip
    if rescale == "l1" and consensus:
        # A sum that rounding alone decides may elect either sign.
        scales = [np.abs(d).sum() / np.abs(d[k]).sum() for d, k in zip(deltas, masks, strict=True)]
        total = sum(w * s * d * k for w, s, d, k in zip(weight, scales, deltas, masks, strict=True))
        merged, wanted = merged[abs(total) > 1e-6], wanted[abs(total) > 1e-6]
        assert len(merged) > 0.8 * size
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=5e-7)


def test_zero_sums_elect_the_positive_sign(kernels):
    base = np.zeros(7, np.float32)
    models = [base, base + np.float32(0.5), base - np.float32(0.5)]
    merged = merge_sparse(kernels, "ties", models, normalize=True)
    assert (merged == 0.5).all()


@pytest.mark.parametrize("out", [BF16, F16, F32, F64])
def test_result_is_rounded_once(kernels, out):
    models = models_of("exact", 3, 2053)
    raw, codes = pack(models, [F32, F32, F32])
    target = np.full(2054 * out.size, 0xCD, np.uint8)
    limits, chances = np.zeros((2, 3), np.uint32), np.zeros(3, np.uint32)
    arguments = (np.zeros(3, np.int64), limits, np.zeros((2, 3), np.int64), chances, np.zeros((3, 2), np.uint32),
                 NO_GAINS[:3])  # fmt: skip
    weights = np.array([0, 0.5, 0.25], np.float32)
    finite = kernels.sparse_sum(raw, codes, 0, *arguments, weights, ONES, kernels.ELECT_NONE, False, np.float32(1), 0,
                                2053, target, kernels.CODES[out])  # fmt: skip
    exact = models[0] + 0.5 * (models[1] - models[0]) + 0.25 * (models[2] - models[0])
    assert finite
    assert (target[-out.size :] == 0xCD).all()
    assert np.array_equal(unpack(target, out, 2053), stored32(exact, out).astype(np.float64))
