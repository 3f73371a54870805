"""Tensors that bitsandbytes packed into 4 bits: which tables belong to each, checked before anything is computed.

Beside ``x.weight`` (two codes a byte) stand ``x.weight.absmax`` (a scale for each block), ``x.weight.quant_map`` (the
16 numbers) and ``x.weight.quant_state.bitsandbytes__nf4``: JSON with the shape and element type that the tensor had.
Where the scales are quantised themselves, ``absmax`` holds bytes, and ``nested_absmax`` and ``nested_quant_map`` undo
that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.checkpoint.header import TensorInfo
from mergekit.checkpoint.json_text import parse_json
from mergekit.dtypes import DType, recipe_dtype
from mergekit.errors import CheckpointError

__all__ = ["Packed", "find_packed"]

_STATE = re.compile(r"^(?P<name>.+)\.quant_state\.bitsandbytes__(?P<scheme>[a-z0-9]+)$")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_MOST_STATE = 1 << 16
"""Bytes of JSON that describe one tensor; a few hundred in practice."""
_DAMAGED = "the file is damaged or hostile, download it again"


@dataclass(frozen=True, slots=True)
class Packed:
    """One packed tensor: what it was, and the tensors that give it back.

    ``scales`` holds a scale for each ``block`` elements. If ``outer`` is not 0 it holds bytes instead, which stand for
    numbers of ``outer_table``; each ``outer`` of them share a scale in ``outer_scales``, and ``offset`` is added.
    """

    dtype: DType
    shape: tuple[int, ...]
    codes: TensorInfo
    table: TensorInfo
    scales: TensorInfo
    block: int
    outer: int = 0
    outer_scales: TensorInfo | None = None
    outer_table: TensorInfo | None = None
    offset: float = 0.0

    def parts(self) -> tuple[TensorInfo, ...]:
        """Every tensor that belongs to it but the codes."""
        return tuple(p for p in (self.table, self.scales, self.outer_scales, self.outer_table) if p is not None)


def find_packed(
    label: object, tensors: Mapping[str, TensorInfo], read: Callable[[list[TensorInfo]], list[bytes]]
) -> tuple[dict[str, Packed], frozenset[str]]:
    """The packed tensors by name, and the names of all tensors that belong to them.

    ``read`` gives the bytes of small tensors, ``label`` names the checkpoint in messages. CheckpointError if tables are
    missing or do not fit.
    """
    states = {match["name"]: name for name in tensors if (match := _STATE.match(name))}
    infos = [tensors[state] for state in states.values()]
    for info in infos:
        if info.nbytes > _MOST_STATE:
            raise CheckpointError(f"{label}: tensor '{info.name}' has {info.nbytes} bytes of description; {_DAMAGED}")
    found = {}
    for (name, state), raw in zip(states.items(), read(infos) if infos else [], strict=True):
        found[name] = _packed(f"{label}: tensor '{name}' (bitsandbytes 4-bit)", name, state, raw, tensors)
    members = {p.name for packed in found.values() for p in packed.parts()} | set(states.values())
    return found, frozenset(members)


def _packed(where: str, name: str, state: str, raw: bytes, tensors: Mapping[str, TensorInfo]) -> Packed:
    record = _record(where, raw)
    parts = {part: tensors.get(f"{name}.{part}") for part in _PARTS}
    codes = tensors.get(name)
    missing = [name] if codes is None else [f"{name}.{part}" for part in _PARTS[:2] if parts[part] is None]
    if missing:
        raise CheckpointError(f"{where} has no '{missing[0]}'; download the model again")
    assert codes is not None
    scales, table = parts["absmax"], parts["quant_map"]
    assert scales is not None
    assert table is not None
    scheme = state.rpartition("bitsandbytes__")[2]
    if scheme not in ("nf4", "fp4"):
        raise CheckpointError(f"{where} is quantised as '{scheme}', which is neither nf4 nor fp4; {_DAMAGED}")
    shape, block = _shape(where, record), record.get("blocksize")
    if block not in _BLOCKS or isinstance(block, bool):
        raise CheckpointError(f"{where} has blocks of {block!r:.40}; they have 32 to 4096 elements, a power of two")
    dtype = recipe_dtype(record["dtype"]) if isinstance(record.get("dtype"), str) else None
    if dtype is None or dtype.size > 4:
        raise CheckpointError(f"{where} had the unknown dtype {record.get('dtype')!r:.40}; {_DAMAGED}")
    size = math.prod(shape)
    blocks = -(-size // block)
    _fits(where, codes, codes.nbytes, -(-size // 2), "bytes of codes")
    _fits(where, table, table.size if table.dtype.is_float else -1, 16, "numbers for the codes")
    _fits(where, scales, scales.size, blocks, "scales")
    if scales.dtype.is_float:
        return Packed(dtype, shape, codes, table, scales, block)
    outer, offset = record.get("nested_blocksize"), record.get("nested_offset")
    outer_scales, outer_table = parts["nested_absmax"], parts["nested_quant_map"]
    if scales.dtype.code != "U8" or outer_scales is None or outer_table is None:
        raise CheckpointError(f"{where} has scales of type {scales.dtype} without the tables to read them; {_DAMAGED}")
    if type(outer) is not int or not 1 <= outer <= 1 << 20:
        raise CheckpointError(f"{where} has a nested_blocksize of {outer!r:.40}; {_DAMAGED}")
    if not isinstance(offset, float) or not math.isfinite(offset):  # as Python writes what was a tensor's item
        raise CheckpointError(f"{where} has a nested_offset of {offset!r:.40}; {_DAMAGED}")
    _fits(where, outer_table, outer_table.size if outer_table.dtype.is_float else -1, 256, "numbers for its scales")
    _fits(where, outer_scales, outer_scales.size if outer_scales.dtype.is_float else -1, -(-blocks // outer),
          "scales of its scales")  # fmt: skip
    return Packed(dtype, shape, codes, table, scales, block, outer, outer_scales, outer_table, float(offset))


def _record(where: str, raw: bytes) -> dict[str, Any]:
    try:
        record = parse_json(raw)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise CheckpointError(f"{where} has a description that is no JSON object; {_DAMAGED}")
    return record


def _shape(where: str, record: Mapping[str, Any]) -> tuple[int, ...]:
    shape = record.get("shape")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8 or not all(type(n) is int and n > 0 for n in shape):
        raise CheckpointError(f"{where} has the shape {shape!r:.60}; {_DAMAGED}")
    return tuple(shape)


def _fits(where: str, info: TensorInfo, found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise CheckpointError(f"{where} needs {wanted} {what}, but '{info.name}' is {info}; {_DAMAGED}")
