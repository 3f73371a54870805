"""Stochastic rounding: only neighbours, with the right odds; exact numbers stay; blocks do not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernel_cases import unpack
from mergekit.dtypes import BF16, F16
from mergekit.kernels import cpu
from mergekit.seeds import stream_key

TYPES = {BF16: torch.bfloat16, F16: torch.float16}
KEY = stream_key(0, "t", -1)


def rounded(values: np.ndarray, dtype, index: int = 0, key=KEY) -> tuple[np.ndarray, bool]:
    out = np.zeros(2 * len(values), np.uint8)
    finite = cpu.round_stochastically(values, len(values), out, cpu.CODES[dtype], index, *key)
    return unpack(out, dtype, len(values)), finite


def neighbours(values: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a 16-bit type around each value, below and above (the same where it is exact)."""
    near = torch.from_numpy(values).to(TYPES[dtype])
    below, above = (torch.nextafter(near, torch.tensor(s * np.inf, dtype=near.dtype)) for s in (-1, 1))
    near, below, above = (x.double().numpy() for x in (near, below, above))
    return np.where(near <= values, near, below), np.where(near >= values, near, above)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_results_are_neighbours_and_right_on_average(dtype):
    random = np.random.default_rng(0)
    scale = np.float32(2) ** random.integers(-20, 10, 4000)  # subnormal float16 numbers, too
    values = (random.standard_normal(4000) * scale).astype(np.float32)
    below, above = neighbours(values, dtype)
    total = np.zeros(4000)
    for seed in range(400):
        got, finite = rounded(values, dtype, key=stream_key(seed, "t", -1))
        assert finite
        assert ((got == below) | (got == above)).all()
        total += got
    gap = np.maximum(above - below, 1e-300)
    # The mean of 400 draws is within 5 standard deviations (at most half a gap each) of the value.
    assert (abs(total / 400 - values) / gap).max() < 5 * 0.5 / 20


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_the_type_holds_exactly_stays(dtype):
    values = torch.arange(0, 1 << 16, 7).to(torch.int16).view(TYPES[dtype]).float().numpy()
    values = values[np.isfinite(values)]
    assert np.array_equal(rounded(values, dtype)[0], values.astype(np.float64))


@pytest.mark.parametrize("cut", [1, 999, 1024, 2500])
def test_the_place_in_the_tensor_decides(cut):
    values = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    whole, _ = rounded(values, BF16)
    parts = [rounded(values[:cut], BF16)[0], rounded(values[cut:], BF16, index=cut)[0]]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_not_finite_is_told(dtype):
    for bad in (np.nan, np.inf, -np.inf, 3.4e38):
        values = np.array([1, bad, 2], np.float32)
        if dtype == F16 or not np.isfinite(bad):
            assert not rounded(values, dtype)[1]
    assert np.isnan(rounded(np.array([np.nan], np.float32), dtype)[0]).all()


def test_signs_of_zero_and_of_tiny_numbers():
    got, _ = rounded(np.array([0.0, -0.0, -1e-9, 1e-9], np.float32), F16)
    assert list(np.signbit(got)) == [False, True, True, False]
