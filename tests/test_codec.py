"""Decoding and encoding by integer arithmetic: every 16-bit pattern, and every kind of rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit.dtypes import BF16, F16, F32, F64
from mergekit.kernels import codec

PATTERNS = np.arange(1 << 16, dtype=np.uint16)
TORCH = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32, F64: torch.float64}


def decoded(values: np.ndarray, dtype, start: int = 0) -> np.ndarray:
    """What ``decode`` makes of stored ``values`` from element ``start`` on."""
    out = np.empty(len(values) - start, np.float32)
    codec.decode(values.view(np.uint8), codec.CODES[dtype], start, len(out), out)
    return out


def encoded(values: np.ndarray, dtype) -> tuple[np.ndarray, bool]:
    """The stored form (unsigned integers; float32 and float64 as they are) of float32 ``values``, and the flag."""
    raw = np.full((len(values) + 2) * dtype.size, 0xAB, np.uint8)
    finite = codec.encode(values, len(values), raw, codec.CODES[dtype], 1)
    assert (raw[: dtype.size] == 0xAB).all(), "bytes before the range changed"
    assert (raw[-dtype.size :] == 0xAB).all(), "bytes behind the range changed"
    kind = {2: np.uint16, 4: np.float32, 8: np.float64}[dtype.size]
    return raw[dtype.size : -dtype.size].view(kind), bool(finite)


def by_torch(values: np.ndarray, dtype) -> np.ndarray:
    """The uint16 patterns that torch rounds float32 ``values`` to."""
    return torch.from_numpy(values).to(TORCH[dtype]).view(torch.uint16).numpy()


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal float32 arrays, zeros by sign; NaN equals any NaN."""
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def check_rounding(values: np.ndarray, dtype) -> None:
    stored, finite = encoded(values, dtype)
    wanted = by_torch(values, dtype)
    is_nan = np.isnan(values)
    assert np.array_equal(stored[~is_nan], wanted[~is_nan])
    assert np.isnan(decoded(stored, dtype)[is_nan]).all()
    assert np.array_equal(stored[is_nan] >> 15, values[is_nan].view(np.uint32) >> 31), "a NaN changed its sign"
    assert finite == bool(torch.isfinite(torch.from_numpy(values).to(TORCH[dtype])).all())


def test_every_float16_decodes_exactly():
    with np.errstate(invalid="ignore"):  # signalling NaN
        assert same_bits(decoded(PATTERNS, F16), PATTERNS.view(np.float16).astype(np.float32))


def test_every_bfloat16_decodes_exactly():
    wanted = torch.from_numpy(PATTERNS).view(torch.bfloat16).to(torch.float32).numpy()
    assert same_bits(decoded(PATTERNS, BF16), wanted)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_16_bit_number_survives_a_round_trip(dtype):
    values = decoded(PATTERNS, dtype)
    stored, finite = encoded(values, dtype)
    is_number = ~np.isnan(values)
    assert np.array_equal(stored[is_number], PATTERNS[is_number])
    assert np.isnan(decoded(stored, dtype)[~is_number]).all()
    assert not finite
    assert encoded(values[np.isfinite(values)], dtype)[1]


@pytest.mark.parametrize(("dtype", "dropped"), [(BF16, 16), (F16, 13)])
def test_every_rounding_decision_is_torchs(dtype, dropped):
    # All values of the bits that stay, with the bits that go: exact, just above, around and at the tie, just below.
    # This reaches every exponent, both zeros, overflow, infinity and NaN.
    half = 1 << (dropped - 1)
    tails = np.array([0, 1, half - 1, half, half + 1, 2 * half - 1], np.uint32)
    heads = np.arange(1 << (32 - dropped), dtype=np.uint32) << np.uint32(dropped)
    for tail in tails:
        check_rounding((heads | tail).view(np.float32), dtype)


def test_subnormal_float16_ties_are_torchs():
    ties = ((np.arange(1025) + 0.5) * 2.0**-24).astype(np.float32)
    around = [ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1))]
    check_rounding(np.concatenate([*around, *(-x for x in around)]), F16)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_random_bits_round_as_torch_does(dtype):
    bits = np.random.default_rng(3).integers(0, 1 << 32, 200_003, dtype=np.uint32)
    check_rounding(bits.view(np.float32), dtype)
    numbers = np.random.default_rng(4).standard_normal(100_003).astype(np.float32)
    check_rounding(numbers, dtype)


@pytest.mark.parametrize(
    ("dtype", "first_beyond"), [(F16, 65520.0), (BF16, 2.0**128 - 2.0**119), (F32, np.inf), (F64, np.inf)]
)
def test_flag_tells_overflow_of_the_storage_type(dtype, first_beyond):
    values = np.ones(2053, np.float32)
    for sign in (1, -1):
        values[1021] = sign * np.nextafter(np.float32(first_beyond), np.float32(0))
        stored, finite = encoded(values, dtype)
        assert finite
        assert np.isfinite(decoded(stored, dtype)).all()
        values[1021] = sign * np.float32(first_beyond)
        stored, finite = encoded(values, dtype)
        assert not finite
        assert decoded(stored, dtype)[1021] == sign * np.inf
        assert (np.delete(decoded(stored, dtype), 1021) == 1).all()


def test_wide_types_pass_unchanged():
    values = np.random.default_rng(5).integers(0, 1 << 32, 4099, dtype=np.uint32).view(np.float32)
    stored, _ = encoded(values, F32)
    assert same_bits(stored, values)
    assert same_bits(decoded(values, F32), values)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide, _ = encoded(values, F64)
        assert np.array_equal(wide, values.astype(np.float64), equal_nan=True)


def test_float64_is_rounded_once_to_float32():
    values = np.random.default_rng(6).standard_normal(4099)
    values[:3] = 1e300, 1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50
    wanted = torch.from_numpy(values).to(torch.float32).numpy()
    assert np.array_equal(decoded(values, F64), wanted)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_decoding_starts_anywhere(dtype):
    values = torch.randn(97, generator=torch.Generator().manual_seed(1)).to(TORCH[dtype])
    raw = values.view(torch.uint8).numpy()
    out = np.empty(60, np.float32)
    codec.decode(raw, codec.CODES[dtype], 37, 60, out)
    assert np.array_equal(out, values[37:].to(torch.float32).numpy())


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_all_finite_finds_one_fault_anywhere(dtype, fault):
    for place in (0, 2047, 2048, 4098):
        values = torch.full((4099,), 3.0).to(TORCH[dtype])
        raw, code = values.view(torch.uint8).numpy(), codec.CODES[dtype]
        assert codec.all_finite(raw, code, 4099)
        values[place] = fault
        assert not codec.all_finite(raw, code, 4099)
        assert codec.all_finite(raw, code, place)


def test_float64_beyond_float32_is_finite():
    assert codec.all_finite(np.array([1e300, -1e300]).view(np.uint8), codec.CODES[F64], 2)


@pytest.mark.parametrize(
    ("table", "dtype"),
    [
        (codec.fp8_table(4, 3, has_infinity=False), torch.float8_e4m3fn),
        (codec.fp8_table(5, 2, has_infinity=True), torch.float8_e5m2),
    ],
)
def test_fp8_tables_are_torchs(table, dtype):
    wanted = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).numpy()
    assert same_bits(table, wanted)


@pytest.mark.parametrize("start", [0, 1, 23, 24, 500])
def test_fp8_block_scales_apply_from_any_start(start):
    random = np.random.default_rng(8)
    table = codec.fp8_table(4, 3, has_infinity=False)
    raw = random.integers(0, 0x7F, (37, 23), dtype=np.uint8)
    scale = random.random((-(-37 // 5), -(-23 // 7))).astype(np.float32)
    wanted = (table[raw] * np.kron(scale, np.ones((5, 7), np.float32))[:37, :23]).reshape(-1)[start:]
    out = np.empty(len(wanted), np.float32)
    codec.dequantize_fp8(raw.reshape(-1)[start:], table, scale, 23, 5, 7, start, len(out), out)
    assert np.array_equal(out, wanted)
