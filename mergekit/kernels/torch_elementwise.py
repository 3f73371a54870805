"""The torch twins of ``elementwise``: chunks as tensors on the device."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mergekit.kernels import elementwise
from mergekit.kernels.codec import CODES
from mergekit.kernels.sparse import COARSE_BINS
from mergekit.kernels.torch_blocks import TorchBlocks, on_device

__all__ = ["ElementwiseKernels"]

_SIZES = {code: dtype.size for dtype, code in CODES.items()}
_DEVICE_CHUNK = 1 << 20


class ElementwiseKernels(TorchBlocks):
    """Chunks of the inputs as tensors on a device."""

    @property
    def CHUNK(self) -> int:  # noqa: N802  (a constant of the CPU back end)
        """See ``elementwise``; larger on a device, where each step is a launch."""
        return elementwise.CHUNK if self.device.type == "cpu" else _DEVICE_CHUNK

    def arrays(self) -> ModuleType:
        """See ``elementwise.arrays``."""
        return torch

    @on_device
    def load_chunk(
        self, raw: np.ndarray, codes: np.ndarray, base: int, start: int, count: int, scratch: np.ndarray
    ) -> tuple[Tensor, ...]:
        """See ``elementwise.load_chunk``; ``scratch`` is not used."""
        values = [
            self._load(row[start * _SIZES[int(code)] :], code, count) for row, code in zip(raw, codes, strict=True)
        ]
        if base < 0:
            return tuple(values)
        return tuple(value if m == base else value - values[base] for m, value in enumerate(values))

    @on_device
    def count_upper(self, keys: Tensor, totals: np.ndarray) -> None:
        """See ``elementwise.count_upper``."""
        bins = (keys.view(torch.int32) & 0x7FFFFFFF) >> 16
        totals[0] += torch.bincount(bins, minlength=COARSE_BINS).cpu().numpy()

    @on_device
    def on_host(self, values: Tensor) -> np.ndarray:
        """See ``elementwise.on_host``."""
        return np.asarray(values.cpu().numpy())
