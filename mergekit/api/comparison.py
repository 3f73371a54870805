"""How models differ: figures for each tensor, and summed over roles, layers, or all."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, TypeVar

from mergekit.families.roles import ROLES
from mergekit.html import html_table

if TYPE_CHECKING:
    import numpy as np

    from mergekit.execute.compare import Sums
    from mergekit.planning.compare import Place

__all__ = ["Comparison", "Figures", "Spectrum"]

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """What sums over some tensors say. Models are given by their positions; the first one is 0, the others 1, 2, ...

    All are None where there is nothing to tell, or a value is not finite.
    """

    sums: Sums

    def is_finite(self, model: int) -> bool:
        """Whether the tensors of the model, and those of the first that are held against them, hold numbers only."""
        return math.isfinite(self.sums.products[model, model]) and math.isfinite(self.sums.origins[model])

    def moved(self, model: int) -> float | None:
        """The length of the model's delta over the length of the first model."""
        return _root(_ratio(self.sums.products[model, model], self.sums.origins[model]))

    def similarity(self, model: int) -> float | None:
        """The cosine between the model's weights and those of the first."""
        origin, cross = self.sums.origins[model], self.sums.products[0, model]
        square = origin + 2 * cross + self.sums.products[model, model]
        return _ratio(origin + cross, math.sqrt(max(origin * square, 0)) if math.isfinite(square) else math.nan)

    def changed(self, model: int) -> float | None:
        """The share of entries that differ from the first model's."""
        return _ratio(self.sums.counts[model, model], self.sums.elements[model])

    def cosine(self, a: int, b: int) -> float | None:
        """The cosine between two models' deltas, over the tensors that both have."""
        squares = self.sums.squares[a, b] * self.sums.squares[b, a]
        return _ratio(self.sums.products[a, b], math.sqrt(squares) if squares > 0 else math.nan)

    def conflict(self, a: int, b: int) -> float | None:
        """Of the entries that both models change, the share that they change in opposite directions."""
        a, b = min(a, b), max(a, b)
        return _ratio(self.sums.counts[b, a], self.sums.counts[a, b])


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of a delta in a few numbers.

    ``largest``: the first eight. ``stable_rank``: the squared length over the square of the largest value.
    ``rank_90``: how many values hold nine tenths of the squared length. ``full_rank``: how many there are.
    """

    largest: tuple[float, ...]
    stable_rank: float
    rank_90: int
    full_rank: int

    @classmethod
    def of(cls, values: np.ndarray) -> Spectrum:
        """The numbers of falling singular values; all zero for a delta of nothing."""
        import numpy as np

        squares = values**2
        total = float(squares.sum())
        if not total > 0:
            return cls((0.0,) * min(8, len(values)), 0.0, 0, len(values))
        enough = int(np.searchsorted(np.cumsum(squares), 0.9 * total)) + 1
        return cls(tuple(map(float, values[:8])), total / float(squares[0]), enough, len(values))


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """How models differ from the first of them, tensor by tensor.

    ``models`` are their names, ``rows`` where tensors stand, in order (``Layout.row``). ``remarks`` say what could not
    be compared; ``spectra`` are by tensor and model, if asked for. ``common_base``: the first is what the others were
    made from, not one of their kind.
    """

    models: tuple[str, ...]
    rows: tuple[str, ...]
    places: tuple[Place, ...]
    sums: tuple[Sums, ...]
    remarks: tuple[str, ...]
    spectra: Mapping[str, Mapping[int, Spectrum]]
    common_base: bool = True

    @property
    def others(self) -> range:
        """The positions of all models but the first."""
        return range(1, len(self.models))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The positions of each two models, without the first."""
        return [(a, b) for a in self.others for b in self.others if a < b]

    def group(self, key: Callable[[Place], Key | None]) -> dict[Key, Figures]:
        """Figures over the tensors that ``key`` gives the same value, in order of appearance; None leaves one out."""
        found: dict[Key, list[Sums]] = {}
        for place, sums in zip(self.places, self.sums, strict=True):
            value = key(place)
            if value is not None:
                found.setdefault(value, []).append(sums)
        return {value: Figures(reduce(add, parts)) for value, parts in found.items()}

    @property
    def total(self) -> Figures:
        """Over all tensors."""
        return self.group(lambda place: True)[True]

    @property
    def matrices(self) -> Figures:
        """Over the tensors of two axes and more; those of one (norms, biases) look alike in unrelated models, too."""
        return self.group(lambda place: len(place.shape) > 1 or None).get(True) or self.total

    def by_role(self) -> dict[str, Figures]:
        """By the role of tensors, in the order in which a model computes."""
        found = self.group(lambda place: place.role)
        return {role: found[role] for role in ROLES if role in found}

    def by_layer(self) -> dict[int, Figures]:
        """By layer of the main stack."""
        return dict(sorted(self.group(lambda place: place.layer).items()))

    def by_tensor(self) -> dict[str, Figures]:
        """Of each tensor by name."""
        return {place.name: Figures(sums) for place, sums in zip(self.places, self.sums, strict=True)}

    def record(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return {
            "models": list(self.models),
            "common_base": self.common_base,
            "remarks": list(self.remarks),
            "total": self._record(self.total),
            "roles": {role: self._record(figures) for role, figures in self.by_role().items()},
            "layers": {str(layer): self._record(figures) for layer, figures in self.by_layer().items()},
            "tensors": {
                place.name: {
                    "role": place.role,
                    "layer": place.layer,
                    "shape": list(place.shape),
                    **self._record(Figures(sums)),
                    **self._spectrum(place),
                }
                for place, sums in zip(self.places, self.sums, strict=True)
            },
        }

    def _repr_html_(self) -> str:
        """A table of roles for notebooks, and the reading."""
        from mergekit.api.advice import percent, reading

        names = [self.models[m] for m in self.others]
        rows = [
            [role, *(percent(f.moved(m)) for m in self.others)]
            for role, f in [*self.by_role().items(), ("all", self.total)]
        ]
        caption = f"Distance from {self.models[0]}, in lengths of its weights"
        return html_table(caption, ["role", *names], rows, [*reading(self), *self.remarks], numbers=len(names))

    def _record(self, figures: Figures) -> dict[str, Any]:
        record: dict[str, Any] = {
            name: [_short(function(model)) for model in self.others]
            for name, function in (
                ("moved", figures.moved), ("similarity", figures.similarity), ("changed", figures.changed)
            )
        }  # fmt: skip
        if self.pairs:
            record["cosines"] = [_short(figures.cosine(*pair)) for pair in self.pairs]
            record["conflicts"] = [_short(figures.conflict(*pair)) for pair in self.pairs]
        return record

    def _spectrum(self, place: Place) -> dict[str, Any]:
        found = self.spectra.get(place.name)
        if found is None:
            return {}
        return {
            "spectra": [
                None if (s := found.get(model)) is None else {
                    "largest": [_short(x) for x in s.largest], "stable_rank": _short(s.stable_rank),
                    "rank_90": s.rank_90, "full_rank": s.full_rank,
                }
                for model in self.others
            ]
        }  # fmt: skip


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole and math.isfinite(part) and math.isfinite(whole) else None


def _root(value: float | None) -> float | None:
    return None if value is None else math.sqrt(max(value, 0))


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
