"""How one tensor of an input model is read: what stands on disk, and what is computed from it."""

from __future__ import annotations

from mergekit.checkpoint import TensorInfo
from mergekit.checkpoint.four_bit import Packed
from mergekit.checkpoint.quantized import scale_of
from mergekit.dtypes import BY_CODE, DType
from mergekit.planning.expression import (
    Bake,
    Cast,
    Dequantize,
    Dequantize4,
    Expression,
    Leaf,
    Quantize4,
    Read,
    Scales4,
    stored,
)
from mergekit.planning.models import Model, Models

__all__ = ["cast", "leaf_of"]


def leaf_of(models: Models, position: int, name: str) -> Leaf:
    """The leaf that gives tensor ``name`` of the model at ``position``: dequantised, and with its adapter baked in."""
    model = models[position]
    change = model.changes.get(name)
    if change is None:
        return _quantised(model, name, _on_disk(model, position, name))
    assert model.adapter is not None
    adapter = len(models.models) + model.adapter
    leaf: Leaf
    if change.saved is not None:
        leaf = Read(adapter, change.saved)
    else:
        leaf = _quantised(model, name, _on_disk(model, position, change.of))
    product = change.product
    if product is None:
        return leaf
    magnitude = None if product.magnitude is None else Read(adapter, product.magnitude)
    return Bake(leaf, Read(adapter, product.a), Read(adapter, product.b), magnitude, product.scale, change.transposed)


def cast(leaf: Leaf, dtype: DType) -> Expression:
    """``leaf`` in element type ``dtype``: itself where it is stored so."""
    return leaf if stored(leaf) == dtype else Cast(leaf)


def _quantised(model: Model, name: str, leaf: Leaf) -> Leaf:
    """``leaf`` as it was when the model's adapter was trained."""
    if model.four_bit is None or name not in model.four_bit.dtypes:
        return leaf
    return Quantize4(leaf, model.four_bit.scheme, model.four_bit.dtypes[name])


def _on_disk(model: Model, position: int, name: str) -> Leaf:
    """A tensor of the model's own files."""
    tensors = model.checkpoint.tensors
    packed = model.checkpoint.packed.get(name)
    if packed is not None:
        return _unpacked(position, packed)
    info = tensors[name]
    read = Read(position, info)
    if info.dtype.kind != "fp8":
        return read
    scale = scale_of(name, tensors)
    assert scale is not None, "refused when the checkpoint was opened"
    return Dequantize(read, Read(position, tensors[scale.tensor]), scale.rows, scale.columns)


def _unpacked(position: int, packed: Packed) -> Dequantize4:
    # The codes may be declared as another type, which only says how many bytes move at once: they are bytes.
    info = packed.codes
    codes = TensorInfo(info.name, BY_CODE["U8"], (info.nbytes,), info.file, info.offset, info.nbytes)
    scales = Scales4(Read(position, packed.scales), packed.block)
    if packed.outer_table is not None and packed.outer_scales is not None:
        table, outer = Read(position, packed.outer_table), Read(position, packed.outer_scales)
        scales = Scales4(scales.values, packed.block, table, outer, packed.outer, packed.offset)
    return Dequantize4(Read(position, codes), Read(position, packed.table), scales, packed.shape, packed.dtype)
