"""Kernels of the ``sparse`` form: exact k-th magnitudes, keep rules, and the fused merge of sparsified deltas.

The k-th largest |delta| of a tensor is found exactly by radix: a histogram of the upper 15 bits of the float32
magnitude, then one of the lower 16 bits inside the bin where the k-th falls. No delta is ever held in memory. Among
elements equal to the k-th magnitude those of lower index are kept.

Buffers are as in ``span``: ``raw`` uint8 [models, bytes], ``codes`` int64 [models]; row ``base`` is the base model.
"""

from __future__ import annotations

import numpy as np

from mergekit.kernels.codec import as_bits, decode, encode
from mergekit.kernels.jit import kernel, reassociating_kernel
from mergekit.kernels.philox import GROUP, fill_random

KEEP_ALL, KEEP_TOP, KEEP_RANDOM, KEEP_NONE, KEEP_BAND, KEEP_GIVEN = 0, 1, 2, 3, 4, 5
ELECT_NONE, ELECT_WEIGHTED, ELECT_UNWEIGHTED = 0, 1, 2
COARSE_BINS = 1 << 15
FINE_BINS = 1 << 16
_TABLES = 4
_RUN = 128
_MAGNITUDE = 0x7FFFFFFF


@kernel
def _deltas(raw: np.ndarray, codes: np.ndarray, base: int, m: int, start: int, origin: np.ndarray, out: np.ndarray,
            size: int) -> None:  # fmt: skip
    decode(raw[m], codes[m], start, size, out)
    for i in range(size):
        out[i] -= origin[i]


@kernel
def coarse_histogram(raw: np.ndarray, codes: np.ndarray, base: int, wanted: np.ndarray, count: int,
                     totals: np.ndarray) -> None:  # fmt: skip
    """Count |delta| by its upper 15 bits into ``totals`` (int64 [models, 32768]) for models with ``wanted``."""
    origin = np.empty(GROUP, np.float32)
    delta = np.empty(GROUP, np.float32)
    keys = np.empty(GROUP, np.uint16)
    # Four tables take turns, so that equal neighbours don't wait for each other's increment.
    tables = np.zeros((_TABLES, COARSE_BINS), np.uint32)
    for m in range(len(codes)):
        if not wanted[m]:
            continue
        tables[:] = 0
        t0, t1, t2, t3 = tables[0], tables[1], tables[2], tables[3]
        for start in range(0, count, GROUP):
            size = min(GROUP, count - start)
            decode(raw[base], codes[base], start, size, origin)
            _deltas(raw, codes, base, m, start, origin, delta, size)
            for i in range(size):
                keys[i] = np.uint16(np.uint32(as_bits(delta[i]) & np.uint32(_MAGNITUDE)) >> np.uint32(16))
            whole = size // _TABLES * _TABLES
            for i in range(0, whole, _TABLES):
                t0[np.uint64(keys[i])] += np.uint32(1)
                t1[np.uint64(keys[i + 1])] += np.uint32(1)
                t2[np.uint64(keys[i + 2])] += np.uint32(1)
                t3[np.uint64(keys[i + 3])] += np.uint32(1)
            for i in range(whole, size):
                t0[np.uint64(keys[i])] += np.uint32(1)
        row = totals[m]
        for i in range(COARSE_BINS):
            row[i] += np.int64(t0[i]) + np.int64(t1[i]) + np.int64(t2[i]) + np.int64(t3[i])


@kernel
def count_low_bits(keys: np.ndarray, size: int, wanted_bin: np.uint32, row: np.ndarray) -> None:
    """Count the lower 16 bits of the keys in one bin. Hits are rare: most runs of keys are passed over at once."""
    for start in range(0, size, _RUN):
        run = keys[start : min(start + _RUN, size)]
        is_hit = np.uint32(0)
        for i in range(len(run)):
            is_hit |= np.uint32(np.uint32(run[i] >> np.uint32(16)) == wanted_bin)
        if is_hit:
            for i in range(len(run)):
                if np.uint32(run[i] >> np.uint32(16)) == wanted_bin:
                    row[np.uint64(run[i] & np.uint32(0xFFFF))] += 1


@kernel
def fine_histogram(raw: np.ndarray, codes: np.ndarray, base: int, wanted: np.ndarray, bins: np.ndarray, count: int,
                   totals: np.ndarray) -> None:  # fmt: skip
    """Count the lower 16 bits of the |delta| whose upper bits are ``bins[m]``, into uint32 [models, 65536]."""
    origin = np.empty(GROUP, np.float32)
    delta = np.empty(GROUP, np.float32)
    keys = np.empty(GROUP, np.uint32)
    for start in range(0, count, GROUP):
        size = min(GROUP, count - start)
        decode(raw[base], codes[base], start, size, origin)
        for m in range(len(codes)):
            if not wanted[m]:
                continue
            _deltas(raw, codes, base, m, start, origin, delta, size)
            for i in range(size):
                keys[i] = as_bits(delta[i]) & np.uint32(_MAGNITUDE)
            count_low_bits(keys, size, np.uint32(bins[m]), totals[m])


@kernel
def _keep(delta: np.ndarray, size: int, rule: int, thresholds: np.ndarray, quota: np.ndarray, m: int,
          chance: np.uint32, keys: np.ndarray, gains: np.ndarray, start: int, index: int, random: np.ndarray,
          kept: np.ndarray) -> None:  # fmt: skip
    """Copy ``delta`` to ``kept``, with zero for what the rule of model ``m`` drops.

    ``delta`` starts at element ``start`` of the block and element ``index`` of the tensor; the other arguments are as
    in ``sparse_sum``. (A copy, since storing in place makes the compiler use masked stores, which some processors
    execute slowly.)
    """
    zero = np.float32(0)
    if rule == KEEP_ALL:
        kept[:size] = delta[:size]
    elif rule == KEEP_NONE:
        kept[:size] = zero
    elif rule == KEEP_RANDOM:
        fill_random(index, keys[m, 0], keys[m, 1], random)
        for i in range(size):
            kept[i] = delta[i] if random[i] < chance else zero
    elif rule == KEEP_GIVEN:
        gain = gains[m, start : start + size]
        for i in range(size):
            kept[i] = delta[i] * gain[i] if gain[i] > zero else zero
    elif rule == KEEP_TOP:
        _keep_top(delta, size, thresholds[0, m], quota[0], m, kept)
    else:
        _keep_band(delta, size, thresholds[0, m], thresholds[1, m], quota, m, kept)


@kernel
def _keep_top(delta: np.ndarray, size: int, threshold: np.uint32, quota: np.ndarray, m: int,
              kept: np.ndarray) -> None:  # fmt: skip
    """``quota[m]`` counts down the entries equal to the threshold that are still to be kept."""
    zero = np.float32(0)
    ties = np.uint32(0)
    for i in range(size):
        magnitude = np.uint32(as_bits(delta[i]) & np.uint32(_MAGNITUDE))
        ties = np.uint32(ties + (np.uint32(1) if magnitude == threshold else np.uint32(0)))
        kept[i] = delta[i] if magnitude >= threshold else zero
    left = quota[m]
    quota[m] = max(left - np.int64(ties), 0)
    if np.int64(ties) > left:
        _drop_ties(delta, size, threshold, left, size, kept)


@kernel
def _keep_band(delta: np.ndarray, size: int, low: np.uint32, high: np.uint32, quota: np.ndarray, m: int,
               kept: np.ndarray) -> None:  # fmt: skip
    """As ``_keep_top``, without what lies above ``high``; ``quota[1, m]`` counts those equal to it, dropped first."""
    zero = np.float32(0)
    low_ties, high_ties = np.uint32(0), np.uint32(0)
    for i in range(size):
        magnitude = np.uint32(as_bits(delta[i]) & np.uint32(_MAGNITUDE))
        low_ties = np.uint32(low_ties + (np.uint32(1) if magnitude == low else np.uint32(0)))
        high_ties = np.uint32(high_ties + (np.uint32(1) if magnitude == high else np.uint32(0)))
        kept[i] = delta[i] if (magnitude >= low) & (magnitude <= high) else zero
    left, skipped = quota[0, m], min(quota[1, m], np.int64(high_ties))
    quota[0, m] = max(left - np.int64(low_ties), 0)
    quota[1, m] -= skipped
    if np.int64(low_ties) > left:
        _drop_ties(delta, size, low, left, size, kept)
    if skipped > 0:
        _drop_ties(delta, size, high, 0, skipped, kept)


@kernel
def _drop_ties(delta: np.ndarray, size: int, threshold: np.uint32, first: int, end: int, kept: np.ndarray) -> None:
    """Zero those entries equal to the threshold that are the ``first``, ... ``end - 1``-th of their kind."""
    seen = 0
    for i in range(size):
        if np.uint32(as_bits(delta[i]) & np.uint32(_MAGNITUDE)) == threshold:
            if first <= seen < end:
                kept[i] = np.float32(0)
            seen += 1


@reassociating_kernel
def _sum_abs(values: np.ndarray, size: int) -> np.float32:
    total = np.float32(0)
    for i in range(size):
        total += abs(values[i])
    return total


@kernel
def _count_kept(size: int, rule: int, chance: np.uint32, gain: np.ndarray, random: np.ndarray,
                kept: np.ndarray) -> int:  # fmt: skip
    """How many entries a rule keeps; for selection by magnitude, where the caller knows, only those not zero."""
    count = np.uint32(0)
    if rule == KEEP_ALL:
        return size
    if rule == KEEP_RANDOM:
        for i in range(size):
            count = np.uint32(count + (np.uint32(1) if random[i] < chance else np.uint32(0)))
    elif rule == KEEP_GIVEN:
        for i in range(size):
            count = np.uint32(count + (np.uint32(1) if gain[i] > np.float32(0) else np.uint32(0)))
    else:
        for i in range(size):
            count = np.uint32(count + (np.uint32(0) if kept[i] == np.float32(0) else np.uint32(1)))
    return int(count)


@kernel
def kept_norms(raw: np.ndarray, codes: np.ndarray, base: int, wanted: np.ndarray, rules: np.ndarray,
               thresholds: np.ndarray, quota: np.ndarray, chances: np.ndarray, keys: np.ndarray, gains: np.ndarray,
               run: int, index: int, count: int, totals: np.ndarray) -> None:  # fmt: skip
    """Add to ``totals`` (float64 [models, 3]) the sums of |delta| before and after the rule, and how many it keeps.

    The count is exact for random and given entries. ``run``: blocks start at multiples of it, and sums in float32 are
    started anew there, so that they don't depend on the size of blocks. The other arguments are as in ``sparse_sum``.
    """
    origin = np.empty(GROUP, np.float32)
    delta = np.empty(GROUP, np.float32)
    kept = np.empty(GROUP, np.float32)
    random = np.empty(GROUP, np.uint32)
    start = 0
    while start < count:
        size = min(GROUP, count - start, run - start % run)
        decode(raw[base], codes[base], start, size, origin)
        for m in range(len(codes)):
            if not wanted[m]:
                continue
            _deltas(raw, codes, base, m, start, origin, delta, size)
            totals[m, 0] += np.float64(_sum_abs(delta, size))
            _keep(delta, size, rules[m], thresholds, quota, m, chances[m], keys, gains, start, index + start, random,
                  kept)  # fmt: skip
            totals[m, 1] += np.float64(_sum_abs(kept, size))
            totals[m, 2] += np.float64(
                _count_kept(size, rules[m], chances[m], gains[m, start : start + size], random, kept)
            )
        start += size


@kernel
def sparse_sum(raw: np.ndarray, codes: np.ndarray, base: int, rules: np.ndarray, thresholds: np.ndarray,
               quota: np.ndarray, chances: np.ndarray, keys: np.ndarray, gains: np.ndarray, weights: np.ndarray,
               scales: np.ndarray, elect: int, normalize: bool, factor: np.float32, index: int, count: int,
               out: np.ndarray, out_code: int) -> bool:  # fmt: skip
    """out = base + factor * (sum of kept, scaled and weighted deltas [/ sum of weights]), rounded once.

    ``rules`` int64 [models] is one of KEEP_... for each. Magnitudes: the bits of |delta| from ``thresholds[0]`` to
    ``thresholds[1]`` (uint32 [2, models]) are kept; ``quota`` (int64 [2, models]) counts down the entries equal to the
    lower one that are still kept, and those equal to the upper one that are still dropped. Random: entries whose
    number, by ``keys`` (uint32 [models, 2]), is below ``chances`` (uint32 [models]). Given: ``gains`` (float32
    [models, count], or [models, 0] without such rules) multiply the deltas; entries whose gain is 0 are dropped.

    With ``elect`` only the deltas whose sign is that of their sum count (zero sums count as positive; the sum is
    weighted or not), and ``normalize`` divides each element by the sum of |weight| of those; with ELECT_NONE,
    ``factor`` must already contain the normalisation. ``index`` is the place of the first element in its tensor (a
    multiple of 1024 if a rule is random); ``weights`` and ``scales`` are float32 [models]. True if the result is
    finite.
    """
    n = len(codes)
    origin = np.empty(GROUP, np.float32)
    delta = np.empty(GROUP, np.float32)
    deltas = np.empty((n, GROUP), np.float32)
    total = np.empty(GROUP, np.float32)
    agreed = np.empty(GROUP, np.float32)
    weight = np.empty(GROUP, np.float32)
    random = np.empty(GROUP, np.uint32)
    finite = True
    for start in range(0, count, GROUP):
        size = min(GROUP, count - start)
        decode(raw[base], codes[base], start, size, origin)
        total[:] = 0
        for m in range(n):
            if m == base:
                continue
            kept = deltas[m]
            _deltas(raw, codes, base, m, start, origin, delta, size)
            _keep(delta, size, rules[m], thresholds, quota, m, chances[m], keys, gains, start, index + start, random,
                  kept)  # fmt: skip
            c = scales[m] if elect == ELECT_UNWEIGHTED else np.float32(weights[m] * scales[m])
            for i in range(size):
                kept[i] *= c
                total[i] += kept[i]
        if elect != ELECT_NONE:
            agreed[:] = 0
            weight[:] = 0
            for m in range(n):
                if m == base:
                    continue
                kept = deltas[m]
                w = abs(weights[m])
                c = weights[m] if elect == ELECT_UNWEIGHTED else np.float32(1)
                # Written so that NaN counts as agreeing: it must show in the result, not vanish.
                for i in range(size):
                    positive = not kept[i] <= np.float32(0)
                    negative = not kept[i] >= np.float32(0)
                    agrees = positive if total[i] >= np.float32(0) else negative
                    agreed[i] += c * kept[i] if agrees else np.float32(0)
                    weight[i] += w if agrees else np.float32(0)
            if normalize:
                for i in range(size):
                    total[i] = agreed[i] / (weight[i] if weight[i] > np.float32(0) else np.float32(1))
            else:
                for i in range(size):
                    total[i] = agreed[i]
        for i in range(size):
            total[i] = origin[i] + factor * total[i]
        finite &= encode(total, size, out, out_code, start)
    return finite
