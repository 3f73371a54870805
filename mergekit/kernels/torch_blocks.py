"""What all torch kernels stand on: blocks of bytes to tensors on a device and back, sums, faults of the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from mergekit.errors import RunError
from mergekit.kernels import codec
from mergekit.kernels.span import GRAM_BLOCK

__all__ = ["TorchBlocks", "add_up", "on_device", "store", "typed"]

_TYPES: dict[int, torch.dtype] = {code: getattr(torch, dtype.name) for dtype, code in codec.CODES.items()}

P = ParamSpec("P")
R = TypeVar("R")


def on_device(kernel: Callable[P, R]) -> Callable[P, R]:
    """``kernel``, whose failing for want of memory on the device is put in a sentence."""

    @wraps(kernel)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return kernel(*args, **kwargs)
        except RuntimeError as error:  # each kind of device has its own class of it
            if "out of memory" not in str(error):
                raise
            raise RunError("the device is out of memory; free some of it, or use --device cpu") from None

    return call


class TorchBlocks:
    """A device, and how the blocks of a merge get there."""

    device: torch.device

    @property
    def wide(self) -> torch.dtype:
        """The type to take inner products in: float64, but for devices that have none."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def _load(self, row: np.ndarray, code: int, count: int) -> Tensor:
        """The first ``count`` elements of a row as float32 on the device. Don't change it: it may be the row itself."""
        values = typed(row, code, count)
        if values.dtype == torch.float64:
            values = values.to(torch.float32)
        return values.to(self.device).to(torch.float32)


def typed(raw: np.ndarray, code: int, count: int) -> Tensor:
    """The first ``count`` elements of ``raw`` in their type, still in the machine's memory."""
    dtype = _TYPES[int(code)]
    return torch.from_numpy(raw[: count * dtype.itemsize]).view(dtype)


def store(values: Tensor, out: np.ndarray, code: int) -> bool:
    """Round float32 ``values`` into ``out`` (uint8); True if all are finite, also as the storage type."""
    dtype = _TYPES[int(code)]
    if dtype != torch.float64:
        values = values.to(dtype)
    target = torch.from_numpy(out[: len(values) * dtype.itemsize]).view(dtype)
    target.copy_(values.cpu())
    return bool(torch.isfinite(values).all())


def add_up(total: float, values: Tensor) -> float:
    """``total`` plus the sum of ``values``: in their type inside blocks of 1,024 elements, float64 between them.

    The blocks are added one after the other, so that the number of elements per call does not matter.
    """
    whole = len(values) // GRAM_BLOCK * GRAM_BLOCK
    sums = [values[:whole].view(-1, GRAM_BLOCK).sum(dim=1)]
    if whole < len(values):
        sums.append(values[whole:].sum().view(1))
    with np.errstate(invalid="ignore"):  # infinities of both signs make NaN, which the caller looks for
        return float(np.cumsum(np.append(total, torch.cat(sums).cpu().numpy().astype(np.float64)))[-1])
