"""The torch back end: the names and signatures of ``kernels.cpu``, on any device that torch can compute on.

Blocks come as bytes in the machine's memory, are moved in their storage type, computed in float32 and moved back, so
the code that follows a plan need not know where the arithmetic happens.

What holds against ``kernels.cpu``, and is tested: random masks, k-th magnitudes, ties and keep rules are the same
exactly. Elementwise results take the same steps in the same order, so on devices with IEEE arithmetic (CPU, CUDA) they
are the same too; MPS may flush subnormal numbers to zero. Only sums over elements are grouped differently inside
blocks of 1,024: Gram matrices and norms agree within 1e-6 of the norms involved, and so do the coefficients and
scales made from them. float64 never reaches a device, since MPS has none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from mergekit.errors import RunError, UsageError
from mergekit.kernels import codec, rounding, sparse
from mergekit.kernels.checksum import checksum
from mergekit.kernels.philox import GROUP, MULTIPLIERS, ROUNDS, WEYL
from mergekit.kernels.span import GRAM_BLOCK
from mergekit.kernels.statistics import statistics

__all__ = ["TorchKernels", "random_words"]

_TYPES: dict[int, torch.dtype] = {code: getattr(torch, dtype.name) for dtype, code in codec.CODES.items()}
_MASK = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF

P = ParamSpec("P")
R = TypeVar("R")


def _on_device(kernel: Callable[P, R]) -> Callable[P, R]:
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


class TorchKernels:
    """Every kernel that the executor calls, computed by torch on ``device`` (``cuda``, ``cuda:1``, ``mps``, ``xpu``).

    Raises UsageError if torch can't compute there. ``block_bytes`` is what a block of all inputs and the output
    should take: much more than a processor's cache holds, since each step is a launch on the device.
    """

    CODES = codec.CODES
    COARSE_BINS, FINE_BINS = sparse.COARSE_BINS, sparse.FINE_BINS
    KEEP_ALL, KEEP_TOP = sparse.KEEP_ALL, sparse.KEEP_TOP
    KEEP_RANDOM, KEEP_NONE = sparse.KEEP_RANDOM, sparse.KEEP_NONE

    # What was written is in the machine's memory, and so are the inputs of the sample: they are looked at there.
    checksum = staticmethod(checksum)
    store = staticmethod(rounding.store)
    round_stochastically = staticmethod(rounding.round_stochastically)
    count_nonfinite = staticmethod(rounding.count_nonfinite)
    statistics = staticmethod(statistics)

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
        return bool(torch.isfinite(_typed(raw, code, count)).all())

    @_on_device
    def weighted_sum(
        self, raw: np.ndarray, codes: np.ndarray, coefficients: np.ndarray, count: int, out: np.ndarray, out_code: int
    ) -> bool:
        """See ``span.weighted_sum``."""
        total = self._load(raw[0], codes[0], count) * float(coefficients[0])
        for m in range(1, len(codes)):
            total += self._load(raw[m], codes[m], count) * float(coefficients[m])
        return _store(total, out, out_code)

    @_on_device
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
        return _store(total + origin, out, out_code)

    @_on_device
    def gram(self, raw: np.ndarray, codes: np.ndarray, base: int, count: int, totals: np.ndarray) -> None:
        """See ``span.gram``."""
        values = [self._load(raw[m], codes[m], count) for m in range(len(codes))]
        if base >= 0:
            values = [value - values[base] for value in values]
        for a in range(len(codes)):
            for b in range(a, len(codes)):
                if base not in (a, b):
                    totals[a, b] = _add_up(totals[a, b], values[a] * values[b])

    @_on_device
    def coarse_histogram(
        self, raw: np.ndarray, codes: np.ndarray, base: int, wanted: np.ndarray, count: int, totals: np.ndarray
    ) -> None:
        """See ``sparse.coarse_histogram``."""
        origin = self._load(raw[base], codes[base], count)
        for m in np.flatnonzero(wanted).tolist():
            magnitude = _magnitude(self._load(raw[m], codes[m], count) - origin)
            totals[m] += _histogram(magnitude >> 16, sparse.COARSE_BINS, totals.dtype)

    @_on_device
    def fine_histogram(
        self,
        raw: np.ndarray,
        codes: np.ndarray,
        base: int,
        wanted: np.ndarray,
        bins: np.ndarray,
        count: int,
        totals: np.ndarray,
    ) -> None:
        """See ``sparse.fine_histogram``."""
        origin = self._load(raw[base], codes[base], count)
        for m in np.flatnonzero(wanted).tolist():
            magnitude = _magnitude(self._load(raw[m], codes[m], count) - origin)
            hits = magnitude[(magnitude >> 16) == int(bins[m])]
            totals[m] += _histogram(hits & 0xFFFF, sparse.FINE_BINS, totals.dtype)

    @_on_device
    def kept_norms(
        self,
        raw: np.ndarray,
        codes: np.ndarray,
        base: int,
        wanted: np.ndarray,
        rules: np.ndarray,
        thresholds: np.ndarray,
        quota: np.ndarray,
        chances: np.ndarray,
        keys: np.ndarray,
        index: int,
        count: int,
        totals: np.ndarray,
    ) -> None:
        """See ``sparse.kept_norms``."""
        origin = self._load(raw[base], codes[base], count)
        for m in np.flatnonzero(wanted).tolist():
            delta = self._load(raw[m], codes[m], count) - origin
            kept = _keep(delta, rules[m], thresholds[m], quota, m, chances[m], keys, index)
            totals[m, 0] = _add_up(totals[m, 0], delta.abs())
            totals[m, 1] = _add_up(totals[m, 1], kept.abs())

    @_on_device
    def sparse_sum(
        self,
        raw: np.ndarray,
        codes: np.ndarray,
        base: int,
        rules: np.ndarray,
        thresholds: np.ndarray,
        quota: np.ndarray,
        chances: np.ndarray,
        keys: np.ndarray,
        weights: np.ndarray,
        scales: np.ndarray,
        consensus: bool,
        normalize: bool,
        factor: np.float32,
        index: int,
        count: int,
        out: np.ndarray,
        out_code: int,
    ) -> bool:
        """See ``sparse.sparse_sum``."""
        origin = self._load(raw[base], codes[base], count)
        total = torch.zeros_like(origin)
        parts: list[tuple[Tensor, float]] = []
        for m in range(len(codes)):
            if m == base:
                continue
            delta = self._load(raw[m], codes[m], count) - origin
            kept = _keep(delta, rules[m], thresholds[m], quota, m, chances[m], keys, index)
            kept = kept * float(np.float32(weights[m] * scales[m]))
            total += kept
            if consensus:
                parts.append((kept, abs(float(weights[m]))))
        if consensus:
            total = _agreed(total, parts, normalize)
        return _store(origin + total * float(factor), out, out_code)

    def _load(self, row: np.ndarray, code: int, count: int) -> Tensor:
        """The first ``count`` elements of a row as float32 on the device. Don't change it: it may be the row itself."""
        values = _typed(row, code, count)
        if values.dtype == torch.float64:
            values = values.to(torch.float32)
        return values.to(self.device).to(torch.float32)


def random_words(first: int, count: int, key0: int, key1: int, device: torch.device) -> Tensor:
    """The random numbers of elements ``first .. first + count`` (``first`` a multiple of 1024), as int64 [count].

    The twin of ``philox.fill_random``: element e takes lane (e mod 1024) div 256 of counter
    (e div 1024) * 256 + (e mod 256). Unsigned 32-bit words are held in int64.
    """
    lane = GROUP // 4
    start, groups = first // GROUP, -(-count // GROUP)
    counter = torch.arange(start * lane, (start + groups) * lane, dtype=torch.int64, device=device)
    x0, x1, x2, x3 = counter & _MASK, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = int(key0), int(key1)
    for _ in range(ROUNDS):
        high_a, low_a = _multiply(MULTIPLIERS[0], x0)
        high_b, low_b = _multiply(MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = high_b ^ x1 ^ k0, low_b, high_a ^ x3 ^ k1, low_a
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    words = torch.stack([x.view(groups, lane) for x in (x0, x1, x2, x3)], dim=1)
    return words.view(-1)[:count]


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of a 32 x 32 bit product, by halves of ``factor``: int64 must not overflow."""
    low = x * (factor & 0xFFFF)
    high = x * (factor >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _typed(raw: np.ndarray, code: int, count: int) -> Tensor:
    """The first ``count`` elements of ``raw`` in their type, still in the machine's memory."""
    dtype = _TYPES[int(code)]
    return torch.from_numpy(raw[: count * dtype.itemsize]).view(dtype)


def _store(values: Tensor, out: np.ndarray, code: int) -> bool:
    """Round float32 ``values`` into ``out`` (uint8); True if all are finite, also as the storage type."""
    dtype = _TYPES[int(code)]
    if dtype != torch.float64:
        values = values.to(dtype)
    target = torch.from_numpy(out[: len(values) * dtype.itemsize]).view(dtype)
    target.copy_(values.cpu())
    return bool(torch.isfinite(values).all())


def _magnitude(delta: Tensor) -> Tensor:
    """The bits of |delta|, int32: for floats, the order of bits is the order of magnitudes."""
    return delta.view(torch.int32) & _MAGNITUDE


def _histogram(keys: Tensor, bins: int, dtype: np.dtype) -> np.ndarray:
    return np.asarray(torch.bincount(keys, minlength=bins).cpu().numpy().astype(dtype))


def _add_up(total: float, values: Tensor) -> float:
    """``total`` plus the sum of float32 ``values``: float32 inside blocks of 1,024 elements, float64 between them.

    The blocks are added one after the other, so that the number of elements per call does not matter.
    """
    whole = len(values) // GRAM_BLOCK * GRAM_BLOCK
    sums = [values[:whole].view(-1, GRAM_BLOCK).sum(dim=1)]
    if whole < len(values):
        sums.append(values[whole:].sum().view(1))
    with np.errstate(invalid="ignore"):  # infinities of both signs make NaN, which the caller looks for
        return float(np.cumsum(np.append(total, torch.cat(sums).cpu().numpy().astype(np.float64)))[-1])


def _keep(
    delta: Tensor, rule: int, threshold: int, quota: np.ndarray, m: int, chance: int, keys: np.ndarray, index: int
) -> Tensor:
    """See ``sparse._keep``: ``delta`` with zero for what the rule of model ``m`` drops."""
    if rule == sparse.KEEP_ALL:
        return delta
    if rule == sparse.KEEP_NONE:
        return torch.zeros_like(delta)
    if rule == sparse.KEEP_RANDOM:
        words = random_words(index, len(delta), keys[m, 0], keys[m, 1], delta.device)
        return torch.where(words < int(chance), delta, 0.0)
    magnitude = _magnitude(delta)
    is_tie = magnitude == int(threshold)
    ties, left = int(is_tie.sum()), int(quota[m])
    quota[m] = max(left - ties, 0)
    is_kept = magnitude >= int(threshold)
    if ties > left:
        is_kept &= ~is_tie | (torch.cumsum(is_tie.to(torch.int32), 0, dtype=torch.int32) <= left)
    return torch.where(is_kept, delta, 0.0)


def _agreed(total: Tensor, parts: list[tuple[Tensor, float]], normalize: bool) -> Tensor:
    """The sum (or weighted mean) of those entries whose sign is that of ``total``; zero counts as positive."""
    is_positive = total >= 0
    agreed, weight = torch.zeros_like(total), torch.zeros_like(total)
    for kept, w in parts:
        # Written so that NaN counts as agreeing: it must show in the result, not vanish.
        agrees = ~torch.where(is_positive, kept <= 0, kept >= 0)
        agreed += torch.where(agrees, kept, 0.0)
        weight += agrees.to(torch.float32) * w
    return agreed / torch.where(weight > 0, weight, 1.0) if normalize else agreed
