"""Torch twins of ``kernels.vectors``: Gram matrices and weighted sums by rows or columns."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mergekit.kernels.torch_blocks import TorchBlocks, on_device, store

__all__ = ["VectorKernels"]


class VectorKernels(TorchBlocks):
    """The kernels for vectors that are rows or columns."""

    @on_device
    def row_grams(
        self, raw: np.ndarray, codes: np.ndarray, base: int, inner: int, first: int, index: int, count: int,
        totals: np.ndarray,
    ) -> None:  # fmt: skip
        """See ``vectors.row_grams``."""
        row = torch.arange(index, index + count, device=self.device) // inner - first
        values = self._models(raw, codes, base, count)
        for a, b, sums in self._sums(values, row, len(totals), base):
            totals[:, a, b] += sums

    @on_device
    def column_grams(
        self, raw: np.ndarray, codes: np.ndarray, base: int, columns: int, index: int, count: int, totals: np.ndarray
    ) -> None:
        """See ``vectors.column_grams``."""
        column = torch.arange(index, index + count, device=self.device) % columns
        for a, b, sums in self._sums(self._models(raw, codes, base, count), column, columns, base):
            totals[a, b] += sums

    @on_device
    def weighted_vectors(
        self, raw: np.ndarray, codes: np.ndarray, table: np.ndarray, base: int, inner: int, index: int, count: int,
        out: np.ndarray, out_code: int,
    ) -> bool:  # fmt: skip
        """See ``vectors.weighted_vectors``."""
        vector = torch.arange(index, index + count, device=self.device) // inner % table.shape[1]
        coefficients = torch.from_numpy(table).to(self.device)
        origin = self._load(raw[base], codes[base], count) if base >= 0 else 0.0
        total = torch.zeros(count, device=self.device)
        for m in range(len(codes)):
            if m != base:
                total += coefficients[m][vector] * (self._load(raw[m], codes[m], count) - origin)
        return store(total + origin, out, out_code)

    def _models(self, raw: np.ndarray, codes: np.ndarray, base: int, count: int) -> list[Tensor]:
        values = [self._load(raw[m], codes[m], count) for m in range(len(codes))]
        if base >= 0:
            values = [value - values[base] for value in values]
        return [value.to(self.wide) for value in values]

    def _sums(self, values: list[Tensor], vector: Tensor, vectors: int, base: int) -> list[tuple[int, int, np.ndarray]]:
        """Inner products of each two models, by vector."""
        found = []
        for a in range(len(values)):
            for b in range(a, len(values)):
                if base not in (a, b):
                    sums = torch.zeros(vectors, dtype=self.wide, device=self.device)
                    sums.index_add_(0, vector, values[a] * values[b])
                    found.append((a, b, sums.cpu().numpy().astype(np.float64)))
        return found
