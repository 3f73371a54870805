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
    ("GPTQ", re.compile(r"\.qweight$|\.qzeros$|\.g_idx$")),
    ("bitsandbytes 4-bit", re.compile(r"\.quant_state\.|\.weight\.absmax$|\.weight\.quant_map$")),
    ("bitsandbytes 8-bit", re.compile(r"\.SCB$|\.weight_format$")),
    ("MXFP4", re.compile(r"_blocks$")),
    ("compressed-tensors", re.compile(r"\.weight_packed$")),
)
_SCALE = re.compile(r"^(?P<weight>.*weight)_scale(?P<inverse>_inv)?$")
_CONFIG_OK = {"fp8", "compressed-tensors", "fbgemm_fp8", "finegrained_fp8", "modelopt"}


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
    for name in tensors:
        for label, pattern in _PACKED:
            if pattern.search(name) and not (label == "MXFP4" and name.replace("_blocks", "_scales") not in tensors):
                kind = _method(config) or label
                raise QuantizedError(f"{folder}: {kind} weights ('{name}') can't be merged; {_REMEDY}")
    method = _method(config)
    has_fp8 = any(info.dtype.kind == "fp8" for info in tensors.values())
    if method and method not in _CONFIG_OK and not has_fp8:
        integers = [n for n, i in tensors.items() if i.dtype.kind == "int" and n.endswith("weight")]
        if integers:
            raise QuantizedError(f"{folder}: {method} weights ('{integers[0]}') can't be merged; {_REMEDY}")
    for name, info in tensors.items():
        if info.dtype.kind == "fp8" and scale_of(name, tensors) is None:
            raise QuantizedError(f"{folder}: fp8 tensor '{name}' {info} has no usable scale beside it; {_REMEDY}")


def _method(config: Mapping[str, Any]) -> str | None:
    record = config.get("quantization_config")
    return str(record.get("quant_method", "quantised")) if isinstance(record, Mapping) else None


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
