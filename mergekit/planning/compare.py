"""Which tensors of several models are the same place, so that they can be held against each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit.dtypes import F32, F64
from mergekit.errors import IncompatibleError, some_of
from mergekit.families.align import align
from mergekit.families.layout import is_derived_buffer, is_embedding, is_head, numbers_out
from mergekit.families.roles import role
from mergekit.planning.build import sources_of
from mergekit.planning.expression import Leaf, Split, stored
from mergekit.planning.leaf import leaf_of
from mergekit.planning.models import Model, Models
from mergekit.planning.plan import Source

__all__ = ["Pairing", "Place", "pair_models"]

_WHOLE = ("int", "bool")


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor of the first model, and what stands there in the others.

    ``layer`` is its number in the main stack, None outside; ``row`` as in ``Layout.row``. ``members`` are the positions
    of the models that have it, the first (0) before all others, and ``inputs`` what gives it in each; all of ``shape``.
    """

    name: str
    role: str
    layer: int | None
    row: str
    shape: tuple[int, ...]
    members: tuple[int, ...]
    inputs: tuple[Leaf, ...]


@dataclass(frozen=True, slots=True)
class Pairing:
    """All places that models have in common, and remarks about what they don't.

    The first ``models`` of ``sources`` are the models, called ``names``; ``rows`` are those of the first one's layout.
    """

    sources: tuple[Source, ...]
    names: tuple[str, ...]
    rows: tuple[str, ...]
    places: tuple[Place, ...]
    remarks: tuple[str, ...]

    @property
    def models(self) -> int:
        """How many models."""
        return len(self.names)

    @property
    def nbytes(self) -> int:
        """Bytes that holding all places against each other reads (as float32 where elements are computed)."""
        return sum(
            math.prod(place.shape) * (stored(leaf) or F32).size for place in self.places for leaf in place.inputs
        )


def pair_models(models: Models) -> Pairing:
    """Hold every tensor of the first of ``models`` against those of the others.

    Tensors of one name and shape go together, other spellings of one architecture included; of embeddings with
    different numbers of rows, the rows that all have. IncompatibleError if no model shares a tensor with the first.
    """
    first = models[0]
    finder = _Finder(models)
    names = [n for n, info in first.tensors.items() if not is_derived_buffer(n, info.shape)]
    places = tuple(place for name in names if (place := finder.place(name)) is not None)
    if not places:
        others = ", ".join(str(m.reference) for m in models.models[1:])
        raise IncompatibleError(
            f"{first.reference} has no tensor in common with {others}: other names, other shapes or integers; "
            f"'mergekit inspect' shows what they are"
        )
    remarks = (*models.warnings, *finder.remarks())
    return Pairing(sources_of(models), finder.names, first.layout.rows, places, remarks)


def _names(models: Models) -> tuple[str, ...]:
    """Short names where they differ, else the references as they were given: who compares has both folders at hand."""
    references = [model.reference for model in models.models]
    often = Counter(reference.short for reference in references)
    return tuple(r.short if often[r.short] == 1 else str(r) for r in references)


class _Finder:
    """The work of ``pair_models``: gathers, for each model, what can't be held against the first, and why."""

    def __init__(self, models: Models) -> None:
        self._models = models
        first = models[0]
        self.names = _names(models)
        self._spelling = [align(first.tensors, model.tensors) for model in models.models]
        self._faults: dict[str, list[str]] = {}
        self._used: list[set[str]] = [set() for _ in models.models]

    def place(self, name: str) -> Place | None:
        """The tensor ``name`` of the first model, with those of the others that fit; None if none does."""
        first = self._models[0]
        info = first.tensors[name]
        if info.dtype.kind in _WHOLE:
            self._fault(f"not compared, for they are integers in {self.names[0]}", name)
            for number in range(len(self._models.models)):
                self._used[number].add(self._spelling[number].get(name, name))
            return None
        members, inputs = [0], [leaf_of(self._models, 0, name)]
        rows = info.shape[0] if info.shape else 0
        for number in range(1, len(self._models.models)):
            model = self._models[number]
            theirs = self._spelling[number].get(name, name)
            other = model.tensors.get(theirs)
            if other is None:
                is_tied = is_head(name) and model.head is None and model.embedding is not None
                what = "ties its head to the embeddings" if is_tied else "has none"
                self._fault(f"not compared, for {self.names[number]} {what}", name)
                continue
            self._used[number].add(theirs)
            if other.dtype.kind in _WHOLE:
                self._fault(f"not compared, for they are integers in {self.names[number]}", name)
                continue
            if not self._fits(first, name, other.shape):
                self._fault(f"not compared, for {self.names[number]} has other shapes", f"{name} {list(other.shape)}")
                continue
            rows = min(rows, other.shape[0] if other.shape else 0)
            members.append(number)
            inputs.append(leaf_of(self._models, number, theirs))
        if len(members) == 1:
            return None
        shape = (rows, *info.shape[1:]) if info.shape else ()
        if info.shape and any(self._rows(n, name) != rows for n in members):
            self._fault(f"compared in the first {rows:,} rows that all have", name)
            inputs = [Split(leaf, 0, rows) if self._rows(n, name) != rows else leaf
                      for n, leaf in zip(members, inputs, strict=True)]  # fmt: skip
        if any(stored(leaf) == F64 for leaf in inputs):
            self._fault("float64, compared as float32", name)
        main = first.layout.main
        place = first.layout.place(name)
        layer = place.index if main is not None and place.stack == main.prefix else None
        return Place(name, role(name), layer, first.layout.row(name), shape, tuple(members), tuple(inputs))

    def remarks(self) -> list[str]:
        """What was not compared, a line for each reason, and what can't be told."""
        first = self._models[0]
        has_layers = any(numbers_out(name) != name for name in first.tensors)
        found = [f"the layers of {self.names[0]} are not numbered 0, 1, 2, ..., so nothing is told by layer"]
        found = found if has_layers and not first.layout.stacks else []
        found += [f"{reason}: {some_of(names)}" for reason, names in self._faults.items()]
        for number, model in enumerate(self._models.models[1:], start=1):
            spare = [
                n for n, i in model.tensors.items() if n not in self._used[number] and not is_derived_buffer(n, i.shape)
            ]
            if spare:
                found.append(f"only {self.names[number]} has: {some_of(spare)}")
        return found

    def _fault(self, reason: str, name: str) -> None:
        self._faults.setdefault(reason, []).append(name)

    def _rows(self, number: int, name: str) -> int:
        return self._models[number].tensors[self._spelling[number].get(name, name)].shape[0]

    @staticmethod
    def _fits(first: Model, name: str, shape: Sequence[int]) -> bool:
        mine = first.tensors[name].shape
        if tuple(shape) == mine:
            return True
        per_token = is_embedding(name) or is_head(name)
        return per_token and len(shape) == len(mine) and tuple(shape[1:]) == mine[1:]
