"""The torch twins of ``sparse``, ``ranks`` and ``groups``: histograms, keep rules, norms, the merge itself.

Masks are the same as on the CPU exactly: magnitudes are compared as whole numbers, random numbers are the documented
ones, and the test of ranks is made in whole numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mergekit.kernels import sparse
from mergekit.kernels.philox import GROUP, MULTIPLIERS, ROUNDS, WEYL
from mergekit.kernels.torch_blocks import TorchBlocks, add_up, on_device, store

__all__ = ["SparseKernels", "random_words"]

_MASK = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF


class SparseKernels(TorchBlocks):
    """The kernels of the ``sparse`` form."""

    COARSE_BINS, FINE_BINS = sparse.COARSE_BINS, sparse.FINE_BINS
    KEEP_ALL, KEEP_NONE, KEEP_TOP = sparse.KEEP_ALL, sparse.KEEP_NONE, sparse.KEEP_TOP
    KEEP_BAND, KEEP_RANDOM, KEEP_GIVEN = sparse.KEEP_BAND, sparse.KEEP_RANDOM, sparse.KEEP_GIVEN
    ELECT_NONE, ELECT_WEIGHTED = sparse.ELECT_NONE, sparse.ELECT_WEIGHTED
    ELECT_UNWEIGHTED = sparse.ELECT_UNWEIGHTED

    @on_device
    def coarse_histogram(
        self, raw: np.ndarray, codes: np.ndarray, base: int, wanted: np.ndarray, count: int, totals: np.ndarray
    ) -> None:
        """See ``sparse.coarse_histogram``."""
        origin = self._load(raw[base], codes[base], count)
        for m in np.flatnonzero(wanted).tolist():
            magnitude = _magnitude(self._load(raw[m], codes[m], count) - origin)
            totals[m] += _histogram(magnitude >> 16, sparse.COARSE_BINS, totals.dtype)

    @on_device
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

    @on_device
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
        gains: np.ndarray,
        run: int,
        index: int,
        count: int,
        totals: np.ndarray,
    ) -> None:
        """See ``sparse.kept_norms``."""
        origin = self._load(raw[base], codes[base], count)
        for m in np.flatnonzero(wanted).tolist():
            delta = self._load(raw[m], codes[m], count) - origin
            kept, chosen = _keep(delta, rules, thresholds, quota, m, chances, keys, gains, index)
            for start in range(0, count, run if run % GROUP else count):
                end = min(start + run, count) if run % GROUP else count
                totals[m, 0] = add_up(totals[m, 0], delta[start:end].abs())
                totals[m, 1] = add_up(totals[m, 1], kept[start:end].abs())
            totals[m, 2] += int((kept != 0).sum() if chosen is None else chosen.sum())

    @on_device
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
        gains: np.ndarray,
        weights: np.ndarray,
        scales: np.ndarray,
        elect: int,
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
        parts: list[tuple[Tensor, float, float]] = []
        for m in range(len(codes)):
            if m == base:
                continue
            delta = self._load(raw[m], codes[m], count) - origin
            kept, _ = _keep(delta, rules, thresholds, quota, m, chances, keys, gains, index)
            is_weighted = elect != sparse.ELECT_UNWEIGHTED
            kept = kept * float(np.float32(weights[m] * scales[m]) if is_weighted else scales[m])
            total += kept
            if elect:
                parts.append((kept, 1.0 if is_weighted else float(weights[m]), abs(float(weights[m]))))
        if elect:
            total = _agreed(total, parts, normalize)
        return store(origin + total * float(factor), out, out_code)

    @on_device
    def rank_gains(
        self,
        raw: np.ndarray,
        codes: np.ndarray,
        base: int,
        wanted: np.ndarray,
        lows: np.ndarray,
        spans: np.ndarray,
        keys: np.ndarray,
        row: int,
        by_chance: bool,
        index: int,
        count: int,
        work: np.ndarray,
        gains: np.ndarray,
    ) -> None:
        """See ``ranks.rank_gains``."""
        origin = self._load(raw[base], codes[base], count)
        divisor, skip = max(2 * (row - 1), 1), index % GROUP
        for m in np.flatnonzero(wanted).tolist():
            low, span = int(lows[m]), int(spans[m])
            ranks = torch.zeros(count, dtype=torch.int64, device=origin.device)
            if span > 0:
                magnitude = _magnitude(self._load(raw[m], codes[m], count) - origin).view(-1, row)
                ordered = magnitude.sort(dim=1).values
                below = torch.searchsorted(ordered, magnitude)
                ranks = (below + torch.searchsorted(ordered, magnitude, right=True) - 1).view(-1)
            words = random_words(index - skip, skip + count, keys[m, 0], keys[m, 1], origin.device)[skip:]
            is_kept = (words - low + 1) * divisor <= span * ranks
            gain = is_kept.to(torch.float32)
            if by_chance:
                least, step = np.float32(low / 2**32), np.float32(span / 2**32 / divisor)
                gain = torch.where(is_kept, 1 / (float(least) + ranks.to(torch.float32) * float(step)), 0.0)
            gains[m, :count] = gain.cpu().numpy()

    @on_device
    def group_gains(
        self,
        raw: np.ndarray,
        codes: np.ndarray,
        base: int,
        wanted: np.ndarray,
        picks: np.ndarray,
        group: int,
        count: int,
        gains: np.ndarray,
    ) -> None:
        """See ``groups.group_gains``."""
        origin = self._load(raw[base], codes[base], count)
        groups = -(-count // group)
        closed = torch.ones(groups * group, dtype=torch.bool, device=origin.device)
        closed[:count] = False  # places that are taken, or beyond the end
        sizes = torch.full((groups, 1), group, device=origin.device)
        sizes[-1:] = count - (groups - 1) * group
        places = torch.arange(group, device=origin.device)
        for m in np.flatnonzero(wanted).tolist():
            magnitude = torch.zeros(groups * group, dtype=torch.int32, device=origin.device)
            magnitude[:count] = _magnitude(self._load(raw[m], codes[m], count) - origin)
            magnitude = magnitude.masked_fill(closed, -1).view(groups, group)
            ordered, order = magnitude.sort(dim=1, descending=True, stable=True)
            pick = (int(picks[m]) * sizes // group).clamp(min=min(1, int(picks[m])))
            chosen = torch.zeros_like(magnitude, dtype=torch.bool)
            chosen.scatter_(1, order, (places < pick) & (ordered >= 0))
            closed |= chosen.view(-1)
            gains[m, :count] = chosen.view(-1)[:count].to(torch.float32).cpu().numpy()


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


def _magnitude(delta: Tensor) -> Tensor:
    """The bits of |delta|, int32: for floats, the order of bits is the order of magnitudes."""
    return delta.view(torch.int32) & _MAGNITUDE


def _histogram(keys: Tensor, bins: int, dtype: np.dtype) -> np.ndarray:
    return np.asarray(torch.bincount(keys, minlength=bins).cpu().numpy().astype(dtype))


def _keep(
    delta: Tensor,
    rules: np.ndarray,
    thresholds: np.ndarray,
    quota: np.ndarray,
    m: int,
    chances: np.ndarray,
    keys: np.ndarray,
    gains: np.ndarray,
    index: int,
) -> tuple[Tensor, Tensor | None]:
    """See ``sparse._keep``: ``delta`` with zero for what the rule of model ``m`` drops; which entries are kept.

    Selection by magnitude gives None for these: its caller knows their number.
    """
    rule = int(rules[m])
    if rule == sparse.KEEP_ALL:
        return delta, torch.ones_like(delta, dtype=torch.bool)
    if rule == sparse.KEEP_NONE:
        return torch.zeros_like(delta), None
    if rule == sparse.KEEP_RANDOM:
        is_kept = random_words(index, len(delta), keys[m, 0], keys[m, 1], delta.device) < int(chances[m])
        return torch.where(is_kept, delta, 0.0), is_kept
    if rule == sparse.KEEP_GIVEN:
        gain = torch.from_numpy(gains[m, : len(delta)]).to(delta.device)
        return torch.where(gain > 0, delta * gain, 0.0), gain > 0
    magnitude = _magnitude(delta)
    is_kept = magnitude >= int(thresholds[0, m])
    ties, left = _ties(magnitude, int(thresholds[0, m]), quota[0], m)
    is_kept &= ~(ties > left)
    if rule == sparse.KEEP_BAND:
        ties, left = _ties(magnitude, int(thresholds[1, m]), quota[1], m)
        is_kept &= (magnitude <= int(thresholds[1, m])) & ~((ties > 0) & (ties <= left))
    return torch.where(is_kept, delta, 0.0), None


def _ties(magnitude: Tensor, threshold: int, quota: np.ndarray, m: int) -> tuple[Tensor, int]:
    """The place of each entry equal to ``threshold`` among these, from 1 (0 for others), and their quota so far."""
    is_tie = magnitude == threshold
    places = torch.cumsum(is_tie.to(torch.int32), 0, dtype=torch.int32)
    left = int(quota[m])
    quota[m] = max(left - (int(places[-1]) if len(places) else 0), 0)
    return torch.where(is_tie, places, 0), left


def _agreed(total: Tensor, parts: list[tuple[Tensor, float, float]], normalize: bool) -> Tensor:
    """The sum (or weighted mean) of those entries whose sign is that of ``total``; zero counts as positive."""
    is_positive = total >= 0
    agreed, weight = torch.zeros_like(total), torch.zeros_like(total)
    for kept, factor, share in parts:
        # Written so that NaN counts as agreeing: it must show in the result, not vanish.
        agrees = ~torch.where(is_positive, kept <= 0, kept >= 0)
        agreed += torch.where(agrees, kept * factor, 0.0)
        weight += agrees.to(torch.float32) * share
    return agreed / torch.where(weight > 0, weight, 1.0) if normalize else agreed
