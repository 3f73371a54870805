"""Hold models against each other: each tensor is read once, in blocks, and nothing of it is kept but sums."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit.execute.buffers import PAGE, Buffers
from mergekit.execute.inputs import Inputs, Reader, read_floats
from mergekit.execute.threads import default_threads
from mergekit.execute.work import ALIGNMENT, BLOCK_BYTES, split
from mergekit.planning.compare import Pairing, Place

__all__ = ["Sums", "compare", "spectra"]

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """What was summed over the elements of tensors, all arrays over the models of a pairing, the first included.

    ``products`` (float64 [n, n], symmetric): inner products; row 0 is the first model, the others are deltas from it.
    ``squares`` (float64 [n, n]): entry (a, b) is the squared length of a's delta in those tensors that b has, too.
    ``counts`` (int64 [n, n]) as in ``kernels.statistics.differences``. ``origins`` (float64 [n]): the squared length of
    the first model in those tensors that each model has, ``elements`` (int64 [n]) how many elements they have.
    """

    products: np.ndarray
    squares: np.ndarray
    counts: np.ndarray
    origins: np.ndarray
    elements: np.ndarray

    @classmethod
    def zero(cls, models: int) -> Sums:
        """Nothing yet."""
        square = (models, models)
        none = np.zeros(models)
        return cls(np.zeros(square), np.zeros(square), np.zeros(square, np.int64), none, none.astype(np.int64))

    def __add__(self, other: Sums) -> Sums:
        """The sums over the elements of both."""
        return Sums(
            self.products + other.products,
            self.squares + other.squares,
            self.counts + other.counts,
            self.origins + other.origins,
            self.elements + other.elements,
        )


def compare(
    pairing: Pairing, kernels: Any, *, threads: int | None = None, advance: Advance = lambda nbytes: None
) -> Iterator[Sums]:
    """The sums of each place, in order. Every byte is read once; ``advance`` is told of the bytes read.

    The same numbers for any number of threads: ranges depend on sizes only, and are added in order.
    """
    local = threading.local()
    with Inputs(pairing.sources) as inputs, ThreadPoolExecutor(threads or default_threads()) as pool:

        def look(unit: tuple[list[Reader], int, int]) -> tuple[np.ndarray, np.ndarray]:
            if not hasattr(local, "buffers"):
                local.buffers = Buffers()
            return _look(*unit, kernels, local.buffers, advance)

        found = pool.map(look, _units(pairing, inputs))
        try:
            for place in pairing.places:
                n = len(place.members)
                products, counts = np.zeros((n, n)), np.zeros((n, n), np.int64)
                for _ in split(_size(place)):
                    more, also = next(found)
                    products += more
                    counts += also
                yield _spread(place, products, counts, pairing.models)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # of an interrupt: what is queued is of no use


def _units(pairing: Pairing, inputs: Inputs) -> Iterator[tuple[list[Reader], int, int]]:
    """All ranges of all places, with the readers that those of one place share."""
    for place in pairing.places:
        readers = [inputs.reader(leaf) for leaf in place.inputs]
        for start, count in split(_size(place)):
            yield readers, start, count


def _look(
    readers: list[Reader], start: int, count: int, kernels: Any, buffers: Buffers, advance: Advance
) -> tuple[np.ndarray, np.ndarray]:
    """The products and counts of ``count`` elements of a place."""
    codes = np.array([kernels.CODES[reader.dtype] for reader in readers], np.int64)
    each = sum(reader.dtype.size for reader in readers)
    block = max(ALIGNMENT, BLOCK_BYTES // each // ALIGNMENT * ALIGNMENT)
    widest = max(reader.dtype.size for reader in readers)
    sources = [(reader.offset + start * reader.dtype.size) % PAGE for reader in readers if reader.offset >= 0]
    rows = buffers.rows(len(readers), block * widest, sources)
    n = len(readers)
    products, counts = np.zeros((n, n)), np.zeros((n, n), np.int64)
    for at in range(start, start + count, block):
        length = min(block, start + count - at)
        for reader, row in zip(readers, rows, strict=True):
            reader.read(at, length, row)
        kernels.differences(rows, codes, length, products, counts)
    advance(count * each)
    return products, counts


def _spread(place: Place, products: np.ndarray, counts: np.ndarray, models: int) -> Sums:
    """What was found about the members of a place, as sums over all models."""
    sums = Sums.zero(models)
    where = np.ix_(place.members, place.members)
    sums.products[where] = np.triu(products) + np.triu(products, 1).T
    sums.squares[where] = np.diag(products)[:, None]
    sums.counts[where] = counts
    members = list(place.members)
    sums.origins[members] = products[0, 0]
    sums.elements[members] = _size(place)
    return sums


def spectra(pairing: Pairing, place: Place) -> dict[int, np.ndarray]:
    """The singular values of each member's delta, falling, by the model's position; float64.

    For matrices; from the eigenvalues of the smaller Gram matrix in float64, so values below a hundred-millionth of the
    largest are noise. Takes the whole tensor of two models in float32 and a square of the shorter side.
    """
    rows, columns = place.shape
    with Inputs(pairing.sources) as inputs:
        origin = _whole(inputs, place, 0)
        found = {}
        for index, model in enumerate(place.members[1:], start=1):
            delta = _whole(inputs, place, index)
            delta -= origin
            gram = _gram(delta if rows <= columns else delta.T)
            found[model] = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0))
    return found


def _gram(matrix: np.ndarray, step: int = 4096) -> np.ndarray:
    """``matrix @ matrix.T`` in float64, a band of columns at a time."""
    gram = np.zeros((len(matrix), len(matrix)))
    for at in range(0, matrix.shape[1], step):
        band = matrix[:, at : at + step].astype(np.float64)
        gram += band @ band.T
    return gram


def _whole(inputs: Inputs, place: Place, index: int) -> np.ndarray:
    values = np.empty(_size(place), np.float32)
    read_floats(inputs.reader(place.inputs[index]), 0, values.size, values)
    return values.reshape(place.shape)


def _size(place: Place) -> int:
    return int(np.prod(place.shape, dtype=np.int64))
