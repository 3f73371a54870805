"""Tensors of torch and arrays of numpy as the engine knows them: element types, bytes to read, bytes to fill."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from mergekit.dtypes import BY_CODE, DType
from mergekit.planning.plan import OutputTensor

__all__ = ["ArrayReader", "ArraySink", "device_of", "dtype_of", "empty", "floating", "is_torch", "wants_gradients"]

_BY_NAME = {dtype.name: dtype for dtype in BY_CODE.values()}


def is_torch(value: Any) -> bool:
    """Whether ``value`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def wants_gradients(value: Any) -> bool:
    """Whether operations on ``value`` are to be recorded for differentiation."""
    if not is_torch(value) or not value.requires_grad:
        return False
    import torch

    return torch.is_grad_enabled()


def device_of(value: Any) -> str:
    """Where the elements are: ``cpu`` for arrays."""
    return str(value.device) if is_torch(value) else "cpu"


def dtype_of(value: Any) -> DType:
    """The element type of a dense tensor or array; TypeError for anything else."""
    if is_torch(value):
        if str(value.layout) != "torch.strided":
            raise TypeError(f"expected a dense tensor, not one of layout {value.layout}")
    elif not isinstance(value, np.ndarray):
        raise TypeError(f"expected a torch tensor or a numpy array, not {type(value).__name__}")
    name = str(value.dtype).removeprefix("torch.")
    if name not in _BY_NAME:
        raise TypeError(f"tensors of {name} can't be merged")
    return _BY_NAME[name]


def floating(name: Any) -> DType:
    """The floating type that ``name`` (text, torch.dtype, numpy dtype) stands for; TypeError if there is none."""
    from mergekit.dtypes import recipe_dtype

    text = name.__name__ if isinstance(name, type) else str(name)
    found = recipe_dtype(text)
    if found is None:
        raise TypeError(f"'{text}' is not a type to compute in. Valid: bfloat16, float16, float32, float64.")
    return found


def empty(like: Any, dtype: DType) -> tuple[Any, np.ndarray]:
    """A tensor (array) of the shape of ``like`` in this machine's memory, and its bytes, uint8 [nbytes]."""
    if is_torch(like):
        import torch

        made = torch.empty(like.shape, dtype=getattr(torch, dtype.name))
        return made, _bytes(made)
    array = np.empty(like.shape, like.dtype if dtype == dtype_of(like) else _numpy_type(dtype))
    return array, _bytes(array)


def _numpy_type(dtype: DType) -> np.dtype[Any]:
    try:
        return np.dtype(dtype.name)
    except TypeError:
        raise TypeError(f"numpy has no {dtype}; give torch tensors, or another dtype") from None


def _bytes(value: Any) -> np.ndarray:
    """The elements as bytes; not a copy if they lie one after the other in this machine's memory."""
    if is_torch(value):
        import torch

        flat = value.detach().cpu().contiguous().reshape(-1)
        return np.asarray(flat.view(torch.uint8).numpy())
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


class ArrayReader:
    """Gives the elements of a tensor in memory."""

    offset = -1  # not in a file

    def __init__(self, value: Any) -> None:
        self.dtype = dtype_of(value)
        self._raw = _bytes(value)

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        """Fill the head of ``row`` (uint8) with elements ``start .. start + count``."""
        size = self.dtype.size
        row[: count * size] = self._raw[start * size : (start + count) * size]


class ArraySink:
    """Keeps one tensor in ``data`` (uint8)."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data

    def write(self, output: OutputTensor, start: int, data: np.ndarray) -> None:
        """Keep ``data``."""
        self._data[start : start + len(data)] = data

    def finish(self, output: OutputTensor, checksum: int, figures: Mapping[str, Any] | None) -> None:
        """Nothing to record."""

    def note(self, tensor: str, text: str) -> None:
        """NaN and infinity are there to be seen in the result."""
