"""4-bit numbers in plain NumPy, for tests: quantised as the papers say, packed as bitsandbytes stores them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from files import Array, encode

__all__ = ["FP4", "NF4", "dynamic", "dynamic_codes", "quantise", "rounded", "to_packed"]

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
"""Dettmers et al. 2023, "QLoRA", appendix E."""

_MAGNITUDES = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
FP4 = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32) / np.float32(12)
"""What the 16 codes of the 4-bit float stand for: a sign, then e and m as bitsandbytes orders them."""


def rounded(values: np.ndarray, code: str) -> np.ndarray:
    """float32 ``values`` rounded to BF16 or F16, as float32."""
    if code == "BF16":
        return (encode("BF16", values)[1].astype("<u4") << 16).view("<f4")
    return values.astype({"F16": "<f2", "F32": "<f4"}[code]).astype("<f4")


def dynamic() -> np.ndarray:
    """The 8-bit dynamic type (Dettmers 2016): 10^-n times the middles of equal parts of [0.1, 1], with signs; 0, 1."""
    found = {0.0, 1.0}
    for zeros in range(7):
        parts = 2 ** (6 - zeros)
        for part in range(parts):
            middle = (0.1 + 0.9 * part / parts + 0.1 + 0.9 * (part + 1) / parts) / 2 * 10.0**-zeros
            found |= {middle, -middle}
    return np.array(sorted(found))


def dynamic_codes(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Scales to codes of the dynamic type: codes, the largest magnitude of each 256, and what was taken off first."""
    offset = np.float32(scales.mean(dtype=np.float64))
    rest = scales - offset
    table = dynamic()
    largest = np.array([np.abs(rest[i : i + 256]).max() for i in range(0, len(rest), 256)], np.float32)
    codes = [
        int(np.abs(table - float(value) / max(float(largest[i // 256]), 1e-38)).argmin())
        for i, value in enumerate(rest)
    ]
    return np.array(codes, np.uint8), largest, float(offset)


def quantise(
    values: np.ndarray, scheme: str = "nf4", block: int = 64, code: str = "F32"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 ``values`` as codes, scales, and the values that are left of them (float32, rounded to ``code``)."""
    levels = NF4 if scheme.startswith("nf4") else FP4
    flat = values.reshape(-1)
    codes, scales = np.empty(flat.size, np.uint8), []
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        scale = np.abs(part).max()
        scales.append(scale)
        for i, value in enumerate(part):
            codes[start + i] = np.abs(levels.astype(np.float64) - float(value) / max(float(scale), 1e-38)).argmin()
    scale_of_block = np.array(scales, np.float32)
    used = scale_of_block
    if scheme.endswith("-double"):
        outer, largest, offset = dynamic_codes(scale_of_block)
        used = dynamic().astype(np.float32)[outer] * np.repeat(largest, 256)[: len(outer)] + np.float32(offset)
    left = levels[codes] * np.repeat(used, block)[: flat.size]
    return codes, scale_of_block, rounded(left, code).reshape(values.shape)


def to_packed(
    name: str, values: np.ndarray, *, scheme: str = "nf4", block: int = 64, code: str = "BF16", nested: bool = False,
    storage: str = "U8", **changes: Any,
) -> tuple[dict[str, Array], np.ndarray]:  # fmt: skip
    """The tensors of ``name`` as bitsandbytes stores it, and the values that they stand for.

    ``changes`` are made to its description; a change to None removes the key.
    """
    codes, scales, _ = quantise(values, scheme, block)
    pairs = np.concatenate([codes, np.zeros(len(codes) % 2, np.uint8)]).reshape(-1, 2)
    raw = (pairs[:, 0] << 4 | pairs[:, 1]).astype("u1")
    state: dict[str, Any] = {"quant_type": scheme, "blocksize": block, "shape": list(values.shape)}
    state["dtype"] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[code]
    levels = NF4 if scheme == "nf4" else FP4
    found: dict[str, Array] = {name: (storage, raw.view({"U8": "u1", "BF16": "<u2"}[storage]).reshape(-1, 1))}
    found[f"{name}.quant_map"] = encode("F32", levels)
    used = scales
    if nested:
        outer, largest, offset = dynamic_codes(scales)
        used = dynamic().astype(np.float32)[outer] * np.repeat(largest, 256)[: len(outer)] + np.float32(offset)
        found[f"{name}.absmax"] = ("U8", outer)
        found[f"{name}.nested_absmax"] = encode("F32", largest)
        found[f"{name}.nested_quant_map"] = encode("F32", dynamic())
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        found[f"{name}.absmax"] = encode("F32", scales)
    text = json.dumps({key: value for key, value in {**state, **changes}.items() if value is not None}).encode()
    found[f"{name}.quant_state.bitsandbytes__{scheme}"] = ("U8", np.frombuffer(text, "u1"))
    left = levels[codes] * np.repeat(used, block)[: math.prod(values.shape)]
    return found, rounded(left, code).reshape(values.shape)
