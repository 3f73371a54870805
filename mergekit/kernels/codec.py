"""Decode storage bytes to float32 and encode float32 to storage bytes, one cache-sized block at a time.

numba has no float16 (nor bfloat16, nor fp8) on the CPU, so all of them are decoded and encoded by integer
arithmetic, which compiles to vector code. Encoding rounds to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from mergekit.dtypes import BF16, F16, F32, F64, DType
from mergekit.kernels.jit import kernel

BLOCK = 2048
"""Elements that a kernel decodes at once: a few such float32 blocks stay in the first-level cache."""

CODES: dict[DType, int] = {BF16: 0, F16: 1, F32: 2, F64: 3}
"""The run-time number by which a kernel tells element types apart."""

_BF16, _F16, _F32, _F64 = 0, 1, 2, 3


@intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 with the given 32 bits."""
    from llvmlite import ir

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), code


@intrinsic
def as_bits(typing_context: Any, value: Any) -> Any:
    """The 32 bits of a float32."""
    from llvmlite import ir

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), code


@kernel
def half_to_float(half: np.uint16) -> np.float32:
    """One IEEE float16, as float32. Exact for every bit pattern.

    Moving the exponent and fraction up 13 bits and multiplying by 2^112 corrects the exponent bias and makes
    subnormals right at the same time; infinities and NaN need their exponent filled.
    """
    bits = np.uint32(half)
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    scaled = as_bits(np.float32(as_float(magnitude) * np.float32(5.192296858534828e33)))
    special = np.uint32(magnitude | np.uint32(0x7F800000))
    exponent = np.uint32(bits & np.uint32(0x7C00))
    return as_float(np.uint32((special if exponent == np.uint32(0x7C00) else scaled) | sign))


@kernel
def float_to_half(value: np.float32) -> np.uint16:
    """The nearest IEEE float16 (ties to even) of a value that rounds to a finite one."""
    bits = as_bits(value)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32((magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13))
    # Adding 0.5 moves a subnormal half's last bit to the float's last bit: the adder does the rounding.
    small = np.uint32(as_bits(np.float32(as_float(magnitude) + np.float32(0.5))) - np.uint32(0x3F000000))
    return np.uint16((small if magnitude < np.uint32(0x38800000) else normal) | sign)


@kernel
def float_to_bfloat(value: np.float32) -> np.uint16:
    """The nearest bfloat16 (ties to even) of a value that is not NaN."""
    bits = as_bits(value)
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@kernel
def decode(raw: np.ndarray, code: int, start: int, count: int, out: np.ndarray) -> None:
    """Write elements ``start .. start+count`` of ``raw`` (uint8, type ``code``) to ``out`` (float32 [count])."""
    if code == _BF16:
        bf16 = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            out[i] = as_float(np.uint32(np.uint32(bf16[i]) << np.uint32(16)))
    elif code == _F16:
        f16 = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            out[i] = half_to_float(f16[i])
    elif code == _F32:
        f32 = raw.view(np.float32)[start : start + count]
        for i in range(count):
            out[i] = f32[i]
    else:
        f64 = raw.view(np.float64)[start : start + count]
        for i in range(count):
            out[i] = np.float32(f64[i])


@kernel
def _largest_bits(values: np.ndarray, count: int) -> np.uint32:
    """The bits of the largest magnitude: for floats, the order of bits is the order of magnitudes."""
    largest = np.uint32(0)
    for i in range(count):
        largest = max(largest, np.uint32(as_bits(values[i]) & np.uint32(0x7FFFFFFF)))
    return largest


@kernel
def encode(values: np.ndarray, count: int, raw: np.ndarray, code: int, start: int) -> bool:
    """Round ``values`` (float32 [count]) into elements ``start .. start+count`` of ``raw``; True if all are finite.

    A value that is finite as float32 but overflows the storage type counts as not finite. The fast loops are right
    for finite results only; a block that holds anything else is written again by the careful one.
    """
    limit = np.uint32(0x7F800000)
    if code == _BF16:
        bf16 = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            bf16[i] = float_to_bfloat(values[i])
        limit = np.uint32(0x7F7F8000)
    elif code == _F16:
        f16 = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            f16[i] = float_to_half(values[i])
        limit = np.uint32(0x477FF000)
    elif code == _F32:
        f32 = raw.view(np.float32)[start : start + count]
        for i in range(count):
            f32[i] = values[i]
    else:
        f64 = raw.view(np.float64)[start : start + count]
        for i in range(count):
            f64[i] = values[i]
    if _largest_bits(values, count) < limit:
        return True
    if code in (_BF16, _F16):
        _encode_special(values, count, raw, code, start)
    return False


@kernel
def _encode_special(values: np.ndarray, count: int, raw: np.ndarray, code: int, start: int) -> None:
    """Write infinities (also those that rounding makes) and NaN as the 16-bit types spell them."""
    halves = raw.view(np.uint16)[start : start + count]
    infinity = np.uint16(0x7F80) if code == _BF16 else np.uint16(0x7C00)
    limit = np.uint32(0x7F7F8000) if code == _BF16 else np.uint32(0x477FF000)
    for i in range(count):
        bits = as_bits(values[i])
        sign = np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000))
        magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
        if magnitude > np.uint32(0x7F800000):
            halves[i] = np.uint16(np.uint16(infinity | np.uint16(infinity >> np.uint16(1))) | sign)
        elif magnitude >= limit:
            halves[i] = np.uint16(infinity | sign)


@kernel
def all_finite(raw: np.ndarray, code: int, count: int) -> bool:
    """Whether the first ``count`` elements of ``raw`` (uint8 [bytes], type ``code``) are finite."""
    if code == _F64:  # these may be finite beyond the range of float32
        return bool(np.isfinite(raw.view(np.float64)[:count]).all())
    values = np.empty(BLOCK, np.float32)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        decode(raw, code, start, size, values)
        if _largest_bits(values, size) >= np.uint32(0x7F800000):
            return False
    return True


@kernel
def dequantize_fp8(
    raw: np.ndarray, table: np.ndarray, scale: np.ndarray, columns: int, rows_per: int, columns_per: int, start: int,
    count: int, out: np.ndarray,
) -> None:  # fmt: skip
    """Elements ``start .. start+count`` of an fp8 matrix with ``columns`` columns, times their scales.

    ``raw`` uint8 [count], ``table`` float32 [256] (the value of each byte), ``scale`` float32 [row blocks, column
    blocks] for blocks of ``rows_per`` x ``columns_per`` elements, ``out`` float32 [count].
    """
    row, column = start // columns, start % columns
    for i in range(count):
        out[i] = table[raw[i]] * scale[row // rows_per, column // columns_per]
        column += 1
        if column == columns:
            column = 0
            row += 1


def fp8_table(exponent_bits: int, fraction_bits: int, *, has_infinity: bool) -> np.ndarray:
    """The float32 value of each of the 256 bytes of an 8-bit float (E4M3FN: 4, 3, no infinity; E5M2: 5, 2, IEEE)."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = np.empty(256, np.float32)
    for byte in range(256):
        exponent = byte >> fraction_bits & (2**exponent_bits - 1)
        fraction = byte & (2**fraction_bits - 1)
        top = exponent == 2**exponent_bits - 1
        if top and has_infinity:
            value = np.inf if fraction == 0 else np.nan
        elif top and fraction == 2**fraction_bits - 1:
            value = np.nan
        elif exponent == 0:
            value = fraction / 2**fraction_bits * 2.0 ** (1 - bias)
        else:
            value = (1 + fraction / 2**fraction_bits) * 2.0 ** (exponent - bias)
        values[byte] = -value if byte & 0x80 else value
    return values
