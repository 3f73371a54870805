"""How one tensor of an input model is read: what stands on disk, and what is computed from it."""

from __future__ import annotations

from mergekit.checkpoint.quantized import scale_of
from mergekit.dtypes import DType
from mergekit.planning.models import Model, Models
from mergekit.planning.plan import Cast, Dequantize, Expression, Leaf, Read, stored

__all__ = ["cast", "leaf_of", "patched"]


def leaf_of(models: Models, position: int, name: str) -> Leaf:
    """The leaf that gives tensor ``name`` of the model at ``position``: dequantised, and with its adapter baked in."""
    tensors = models[position].checkpoint.tensors
    info = tensors[name]
    read = Read(position, info)
    if info.dtype.kind != "fp8":
        return read
    scale = scale_of(name, tensors)
    assert scale is not None, "refused when the checkpoint was opened"
    return Dequantize(read, Read(position, tensors[scale.tensor]), scale.rows, scale.columns)


def patched(model: Model) -> tuple[str, ...]:
    """The tensors of ``model`` that its adapter changes, by the names that the model has for them."""
    return ()


def cast(leaf: Leaf, dtype: DType) -> Expression:
    """``leaf`` in element type ``dtype``: itself where it is stored so."""
    return leaf if stored(leaf) == dtype else Cast(leaf)
