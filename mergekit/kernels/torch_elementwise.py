"""The torch twins of ``elementwise``: chunks as tensors on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit.kernels import elementwise
from mergekit.kernels.codec import CODES
from mergekit.kernels.sparse import COARSE_BINS, FINE_BINS
from mergekit.kernels.torch_blocks import TorchBlocks, on_device
from mergekit.kernels.trace import UntraceableError

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

    def fuse(
        self,
        function: Callable[..., Any],
        arrays: int,
        extra: tuple[Any, ...] = (),
        parameters: Mapping[str, Any] = MappingProxyType({}),
        *,
        sums: bool = False,
    ) -> Any:
        """See ``fused.fuse``: raises UntraceableError, since functions are called with tensors here."""
        raise UntraceableError("torch computes with tensors")

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
    def count_upper(self, keys: Tensor, totals: np.ndarray) -> int:
        """See ``elementwise.count_upper``."""
        totals[0] += torch.bincount(_bits(keys) >> 16, minlength=COARSE_BINS).cpu().numpy()
        return int(torch.count_nonzero(keys))

    @on_device
    def count_lower(self, keys: Tensor, upper: int, totals: np.ndarray) -> None:
        """See ``elementwise.count_lower``."""
        bits = _bits(keys)
        hits = bits[(bits >> 16) == upper] & 0xFFFF
        totals += torch.bincount(hits, minlength=FINE_BINS).cpu().numpy().astype(totals.dtype)

    @on_device
    def keep_largest(
        self, x: tuple[Tensor, ...], keys: Tensor, threshold: int, left: int
    ) -> tuple[tuple[Tensor, ...], int]:
        """See ``elementwise.keep_largest``; the arrays stay as they are."""
        bits = _bits(keys)
        is_kept, is_tie = bits >= threshold, bits == threshold
        ties = int(torch.count_nonzero(is_tie))
        if ties > left:
            is_kept = is_kept & (~is_tie | (torch.cumsum(is_tie, 0) <= left))
        kept = is_kept.to(torch.float32)
        return tuple(values * kept for values in x), max(left - ties, 0)

    @on_device
    def on_host(self, values: Tensor) -> np.ndarray:
        """See ``elementwise.on_host``."""
        return np.asarray(values.cpu().numpy())


def _bits(keys: Tensor) -> Tensor:
    """The bits of keys: for floats that are not negative, their order is that of the numbers."""
    return keys.view(torch.int32) & 0x7FFFFFFF
