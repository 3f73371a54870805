"""The torch back end: the names and signatures of ``kernels.cpu``, on any device that torch can compute on.

Blocks come as bytes in the machine's memory, are moved in their storage type, computed in float32 and moved back, so
the code that follows a plan need not know where the arithmetic happens.

What holds against ``kernels.cpu``, and is tested: random masks, k-th magnitudes, ties and keep rules are the same
exactly. Elementwise results take the same steps in the same order, so on devices with IEEE arithmetic (CPU, CUDA) they
are the same too; MPS may flush subnormal numbers to zero. Only sums over elements are grouped differently inside
blocks of 1,024: Gram matrices and norms agree within 1e-6 of the norms involved, and so do the coefficients and
scales made from them. Only inner products of the ``span`` form are taken in float64, where the device has it.
"""

from __future__ import annotations

import numpy as np
import torch

from mergekit.errors import UsageError
from mergekit.kernels import codec, rounding
from mergekit.kernels.checksum import checksum
from mergekit.kernels.statistics import differences, statistics
from mergekit.kernels.torch_blocks import add_up, on_device, store, typed
from mergekit.kernels.torch_elementwise import ElementwiseKernels
from mergekit.kernels.torch_sparse import SparseKernels, random_words
from mergekit.kernels.torch_vectors import VectorKernels

__all__ = ["TorchKernels", "random_words"]


class TorchKernels(SparseKernels, ElementwiseKernels, VectorKernels):
    """Every kernel that the executor calls, computed by torch on ``device`` (``cuda``, ``cuda:1``, ``mps``, ``xpu``).

    Raises UsageError if torch can't compute there. ``block_bytes`` is what a block of all inputs and the output
    should take: much more than a processor's cache holds, since each step is a launch on the device.
    """

    CODES = codec.CODES

    # What was written is in the machine's memory, and so are the inputs of the sample: they are looked at there.
    checksum = staticmethod(checksum)
    store = staticmethod(rounding.store)
    round_stochastically = staticmethod(rounding.round_stochastically)
    count_nonfinite = staticmethod(rounding.count_nonfinite)
    statistics = staticmethod(statistics)
    differences = staticmethod(differences)

    def __init__(self, device: str) -> None:
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"torch can't compute on '{device}' here ({reason}); use --device cpu") from None
        self.block_bytes = (1 if self.device.type == "cpu" else 64) << 20

    def all_finite(self, raw: np.ndarray, code: int, count: int) -> bool:
        """See ``codec.all_finite``. On the machine itself: these bytes are only copied."""
        return bool(torch.isfinite(typed(raw, code, count)).all())

    @on_device
    def weighted_sum(
        self, raw: np.ndarray, codes: np.ndarray, coefficients: np.ndarray, count: int, out: np.ndarray, out_code: int
    ) -> bool:
        """See ``span.weighted_sum``."""
        total = self._load(raw[0], codes[0], count) * float(coefficients[0])
        for m in range(1, len(codes)):
            total += self._load(raw[m], codes[m], count) * float(coefficients[m])
        return store(total, out, out_code)

    @on_device
    def weighted_delta_sum(
        self,
        raw: np.ndarray,
        codes: np.ndarray,
        coefficients: np.ndarray,
        base: int,
        count: int,
        out: np.ndarray,
        out_code: int,
    ) -> bool:
        """See ``span.weighted_delta_sum``."""
        origin = self._load(raw[base], codes[base], count)
        total = torch.zeros_like(origin)
        for m in range(len(codes)):
            if m != base:
                total += (self._load(raw[m], codes[m], count) - origin) * float(coefficients[m])
        return store(total + origin, out, out_code)

    @on_device
    def gram(self, raw: np.ndarray, codes: np.ndarray, base: int, count: int, totals: np.ndarray) -> None:
        """See ``span.gram``."""
        values = [self._load(raw[m], codes[m], count) for m in range(len(codes))]
        if base >= 0:
            values = [value - values[base] for value in values]
        values = [value.to(self.wide) for value in values]
        for a in range(len(codes)):
            for b in range(a, len(codes)):
                if base not in (a, b):
                    totals[a, b] = add_up(totals[a, b], values[a] * values[b])
