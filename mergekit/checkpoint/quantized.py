"""Quantised checkpoints: fp8 with scales can be read; packed integers are recognised and refused, never averaged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.checkpoint.header import TensorInfo
from mergekit.errors import QuantizedError

__all__ = ["Scale", "refuse_quantized", "scale_of", "scale_target"]

_REMEDY = "merge the unquantised (bfloat16 or float16) model and quantise the result"
_PACKED = (
    ("GPTQ or AWQ", re.compile(r"\.qweight$|\.qzeros$|\.g_idx$")),
    ("bitsandbytes 4-bit", re.compile(r"\.quant_state\.|\.weight\.absmax$|\.weight\.quant_map$")),
    ("bitsandbytes 8-bit", re.compile(r"\.SCB$|\.weight_format$")),
    ("MXFP4", re.compile(r"_blocks$")),
    ("compressed-tensors", re.compile(r"\.weight_packed$")),
    ("EXL2", re.compile(r"\.q_weight$")),
    ("HQQ", re.compile(r"\.W_q$")),
    ("AQLM", re.compile(r"\.codes$")),
    ("Quanto", re.compile(r"\.weight\._data$")),
)
_SCALE = re.compile(r"^(?P<weight>.*weight)_scale(?P<inverse>_inv)?$")


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale tensor of an fp8 weight: value = fp8 * scale of its block of ``rows`` x ``columns`` elements.

    The names ``weight_scale`` and ``weight_scale_inv`` both hold the factor to multiply by.
    """

    tensor: str
    rows: int
    columns: int


def refuse_quantized(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise QuantizedError, with the remedy, if the tensors are packed integers or fp8 without usable scales."""
    method = _method(config)
    for name, info in tensors.items():
        for label, pattern in _PACKED:
            if not pattern.search(name) or (info.dtype.is_float and not label.startswith("bitsandbytes")):
                continue
            if label == "MXFP4" and name.replace("_blocks", "_scales") not in tensors:
                continue
            raise QuantizedError(f"{folder}: {method or label} weights ('{name}') can't be merged; {_REMEDY}")
    for name, info in tensors.items():
        if info.dtype.kind == "int" and name.endswith("weight") and (method or f"{name}_scale" in tensors):
            raise QuantizedError(f"{folder}: {method or 'integer'} weights ('{name}') can't be merged; {_REMEDY}")
    for name, info in tensors.items():
        if info.dtype.kind == "fp8" and scale_of(name, tensors) is None:
            raise QuantizedError(f"{folder}: fp8 tensor '{name}' {info} has no usable scale beside it; {_REMEDY}")


def _method(config: Mapping[str, Any]) -> str | None:
    record = config.get("quantization_config")
    if not isinstance(record, Mapping):
        return None
    name = str(record.get("quant_method", "quantised"))
    return name.upper() if name in ("gptq", "awq", "mxfp4", "hqq", "aqlm") else name


def scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> Scale | None:
    """The scale of fp8 tensor ``name``: per tensor, per row, or per block; None if there is none that fits."""
    weight = tensors[name]
    for candidate in (f"{name}_scale_inv", f"{name}_scale"):
        scale = tensors.get(candidate)
        if scale is None or not scale.dtype.is_float:
            continue
        rows = weight.shape[0] if weight.shape else 1
        columns = weight.size // rows if rows else 0
        if scale.size == 1:
            return Scale(candidate, max(rows, 1), max(columns, 1))
        if len(weight.shape) != 2:
            return None
        if scale.shape in ((rows,), (rows, 1)):
            return Scale(candidate, 1, columns)
        if len(scale.shape) == 2:
            block_rows, block_columns = (_block(n, k) for n, k in zip(weight.shape, scale.shape, strict=True))
            if block_rows and block_columns:
                return Scale(candidate, block_rows, block_columns)
    return None


def _block(length: int, count: int) -> int | None:
    """The block size that cuts ``length`` into ``count`` blocks: a power of two as used in practice, else exact."""
    for size in (128, 64, 32, 16, 256, 512):
        if -(-length // size) == count:
            return size
    return length // count if count and length % count == 0 else None


def scale_target(name: str) -> str | None:
    """The weight that tensor ``name`` is the scale of, by its name."""
    match = _SCALE.match(name)
    return match["weight"] if match else None
