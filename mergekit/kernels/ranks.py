"""The kernel that keeps entries of deltas at random by the rank of their magnitude in their row (DELLA).

It fills ``gains`` (float32 [models, count]) for the rule KEEP_GIVEN of ``sparse``: 0 drops an entry. Buffers are as
in ``span``; blocks hold whole rows.

Few entries need their exact rank. A histogram of the row bounds the ranks of each bin's entries, and so their
probabilities; an entry whose random number is not between the bounds is decided. For the others equal entries of the
bin are counted, and only a row with many open cases (or one that is very long) is sorted.
"""

from __future__ import annotations

import numpy as np

from mergekit.kernels.codec import as_bits, decode
from mergekit.kernels.jit import kernel
from mergekit.kernels.philox import GROUP, fill_random

SHORT_ROW = 128
"""Rows up to this length are ranked by counting."""
_LONG_ROW = 2048
_MOST_BINNED = 1 << 15
"""In longer rows counting the open cases takes longer than sorting."""
_BINS = 1 << 11
_MAGNITUDE = 0x7FFFFFFF


@kernel
def rank_gains(raw: np.ndarray, codes: np.ndarray, base: int, wanted: np.ndarray, lows: np.ndarray, spans: np.ndarray,
               keys: np.ndarray, row: int, by_chance: bool, index: int, count: int, work: np.ndarray,
               gains: np.ndarray) -> None:  # fmt: skip
    """The gains of entries kept at random by their rank in their row, for the models with ``wanted``.

    The entry of mean rank r in a row of ``row`` entries is kept with probability p = ``lows[m]`` + ``spans[m]`` *
    r / (row - 1) (int64 [models], in units of 2^-32); its gain is 1, or 1 / p with ``by_chance``. The test is made in
    whole numbers: with R = 2 r, D = 2 (row - 1) and the entry's random number w,
    w < low + floor(span R / D) is the same as (w - low + 1) D <= span R.
    ``index`` is the place of the first element in its tensor; ``work`` is uint64 [2, row] of scratch.
    """
    magnitudes, words, ranks = np.empty(row, np.uint32), np.empty(row, np.uint32), np.zeros(row, np.uint32)
    tables = np.empty((5, _BINS), np.int64)
    is_binned = SHORT_ROW < row <= _MOST_BINNED and not by_chance
    for m in range(len(codes)):
        if not wanted[m]:
            continue
        gain = gains[m]
        # Until they are used, the random numbers are kept where the gains will be.
        _draw(keys[m, 0], keys[m, 1], index, count, gain.view(np.uint32))
        for first in range(0, count, row):
            own = gain[first : first + row]
            words[:] = own.view(np.uint32)
            if spans[m] > 0:
                _load_magnitudes(raw, codes, base, m, first, row, magnitudes)
                if is_binned and _decide_by_bins(magnitudes, words, row, lows[m], spans[m], tables, own):
                    continue
                if row <= SHORT_ROW:
                    _rank_by_counting(magnitudes, row, ranks)
                else:
                    _rank_by_sorting(magnitudes, row, work, ranks)
            else:
                ranks[:] = 0
            _decide(words, ranks, row, lows[m], spans[m], by_chance, own)


@kernel
def _draw(key0: int, key1: int, index: int, count: int, words: np.ndarray) -> None:
    """The random numbers of ``count`` elements from ``index``."""
    random = np.empty(GROUP, np.uint32)
    start = 0
    while start < count:
        skip = (index + start) % GROUP
        size = min(GROUP - skip, count - start)
        fill_random(index + start - skip, key0, key1, random)
        words[start : start + size] = random[skip : skip + size]
        start += size


@kernel
def _load_magnitudes(raw: np.ndarray, codes: np.ndarray, base: int, m: int, first: int, row: int,
                     magnitudes: np.ndarray) -> None:  # fmt: skip
    """The bits of |delta| of ``row`` elements from ``first``."""
    origin = np.empty(GROUP, np.float32)
    delta = np.empty(GROUP, np.float32)
    for start in range(0, row, GROUP):
        size = min(GROUP, row - start)
        decode(raw[base], codes[base], first + start, size, origin)
        decode(raw[m], codes[m], first + start, size, delta)
        part = magnitudes[start : start + size]
        for i in range(size):
            part[i] = as_bits(np.float32(delta[i] - origin[i])) & np.uint32(_MAGNITUDE)


@kernel
def _decide(words: np.ndarray, ranks: np.ndarray, row: int, low: int, span: int, by_chance: bool,
            gain: np.ndarray) -> None:  # fmt: skip
    """Set the gains of a row, whose ``ranks`` are twice the mean ranks."""
    divisor = np.int64(max(2 * (row - 1), 1))
    least = np.float32(np.float64(low) / 4294967296.0)
    step = np.float32(np.float64(span) / 4294967296.0 / np.float64(divisor))
    for i in range(row):
        is_kept = (np.int64(words[i]) - low + 1) * divisor <= span * np.int64(ranks[i])
        value = np.float32(1) / (least + step * np.float32(ranks[i])) if by_chance else np.float32(1)
        gain[i] = value if is_kept else np.float32(0)


@kernel
def _decide_by_bins(magnitudes: np.ndarray, words: np.ndarray, row: int, low: int, span: int, tables: np.ndarray,
                    gain: np.ndarray) -> bool:  # fmt: skip
    """Set the gains of a row (all 0 or 1) without sorting; False if too many entries would have to be counted."""
    bins, bin_of = 1 << 9, np.empty(row, np.uint16)
    while bins < _BINS and bins < row:
        bins <<= 1
    _choose_bins(magnitudes, row, bins, bin_of)
    starts, below, beyond, samples, mixed = tables[0], tables[1], tables[2], tables[3], tables[4]
    _bound_chances(bin_of, row, bins, low, span, starts, below, beyond)
    open_cases, num_open = np.empty(row + 1, np.int64), 0
    for i in range(row):
        b, word = np.int64(bin_of[i]), np.int64(words[i])
        gain[i] = np.float32(1) if word < below[b] else np.float32(0)
        open_cases[num_open] = i
        num_open += (word >= below[b]) & (word < beyond[b])
    if num_open == 0:
        return True
    # Which bins hold but one magnitude? There the rank follows from the bin.
    mixed[:bins] = 0
    for j in range(num_open):
        samples[np.uint64(bin_of[open_cases[j]])] = np.int64(magnitudes[open_cases[j]])
    for i in range(row):
        b = np.int64(bin_of[i])
        mixed[b] |= np.int64(magnitudes[i]) ^ samples[b]
    divisor, counted = np.int64(2 * (row - 1)), 0
    for j in range(num_open):
        i = open_cases[j]
        b = np.int64(bin_of[i])
        end = starts[b + 1] if b + 1 < bins else row
        rank = starts[b] + end - 1
        if mixed[b] != 0:
            counted += 1
            if counted > 4 + row // 256:
                return False
            rank = _rank_of(magnitudes, row, magnitudes[i])
        gain[i] = np.float32(1) if (np.int64(words[i]) - low + 1) * divisor <= span * rank else np.float32(0)
    return True


@kernel
def _choose_bins(magnitudes: np.ndarray, row: int, bins: int, bin_of: np.ndarray) -> None:
    """Bins of equal width in the leading bits, 16 powers of two below the largest; what is smaller shares one."""
    shift, width = np.uint32(16), bins
    while width < _BINS:
        shift = np.uint32(shift + np.uint32(1))
        width <<= 1
    largest = np.uint32(0)
    for i in range(row):
        largest = max(largest, magnitudes[i])
    offset = np.int32(max(np.int32(largest >> shift) - np.int32(bins - 1), np.int32(0)))
    for i in range(row):
        bin_of[i] = np.uint16(max(np.int32(np.int32(magnitudes[i] >> shift) - offset), np.int32(0)))


@kernel
def _bound_chances(bin_of: np.ndarray, row: int, bins: int, low: int, span: int, starts: np.ndarray,
                   below: np.ndarray, beyond: np.ndarray) -> None:  # fmt: skip
    """How many entries lie below each bin; the random numbers below which its entries are kept, and from which not.

    Bounds in float64 are a unit apart from exact ones at most, and so are set two units too wide.
    """
    starts[:bins] = 0
    for i in range(row):
        starts[np.uint64(bin_of[i])] += 1
    slope = np.float64(span) / np.float64(2 * (row - 1))
    start = 0
    for b in range(bins):
        held = starts[b]
        starts[b] = start
        below[b] = low + np.int64(slope * np.float64(2 * start)) - 2
        start += held
        beyond[b] = low + np.int64(slope * np.float64(2 * (start - 1))) + 2


@kernel
def _rank_of(magnitudes: np.ndarray, row: int, own: np.uint32) -> int:
    """Twice the mean rank of one entry."""
    twice = np.uint32(0)
    for j in range(row):
        twice = np.uint32(twice + np.uint32(magnitudes[j] < own) + np.uint32(magnitudes[j] <= own))
    return int(twice) - 1  # itself is not below itself


@kernel
def _rank_by_counting(magnitudes: np.ndarray, row: int, ranks: np.ndarray) -> None:
    for i in range(row):
        ranks[i] = np.uint32(_rank_of(magnitudes, row, magnitudes[i]))


@kernel
def _rank_by_sorting(magnitudes: np.ndarray, row: int, work: np.ndarray, ranks: np.ndarray) -> None:
    """Sort by radix, a few bits of the magnitude at a time, the lower ones first; then number the runs of equals."""
    entries, other = work[0], work[1]
    for i in range(row):
        entries[i] = np.uint64(np.uint64(magnitudes[i]) << np.uint64(32)) | np.uint64(i)
    bits = 11 if row >= _LONG_ROW else 8
    table = np.empty((-(-31 // bits), 1 << bits), np.uint32)
    _count_digits(entries, row, bits, table)
    mask = np.uint64((1 << bits) - 1)
    for step in range(len(table)):
        places = table[step]
        shift = np.uint64(32 + step * bits)
        if places[(entries[0] >> shift) & mask] == row:
            continue  # all have the same digit
        total = np.uint32(0)
        for j in range(len(places)):
            held = places[j]
            places[j] = total
            total = np.uint32(total + held)
        for i in range(row):
            entry = entries[i]
            digit = (entry >> shift) & mask
            other[np.uint64(places[digit])] = entry
            places[digit] += np.uint32(1)
        entries, other = other, entries
    start = 0
    while start < row:
        magnitude = entries[start] >> np.uint64(32)
        end = start + 1
        while end < row and entries[end] >> np.uint64(32) == magnitude:
            end += 1
        for i in range(start, end):
            ranks[entries[i] & np.uint64(0xFFFFFFFF)] = np.uint32(start + end - 1)
        start = end


@kernel
def _count_digits(entries: np.ndarray, row: int, bits: int, table: np.ndarray) -> None:
    """How often each digit occurs at each place, in one walk over the entries."""
    table[:] = 0
    width, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
    first, second, third, last = table[0], table[1], table[2], table[len(table) - 1]
    for i in range(row):
        rest = entries[i] >> np.uint64(32)
        first[rest & mask] += np.uint32(1)
        rest >>= width
        second[rest & mask] += np.uint32(1)
        rest >>= width
        third[rest & mask] += np.uint32(1)
        if len(table) == 4:
            last[rest >> width] += np.uint32(1)
