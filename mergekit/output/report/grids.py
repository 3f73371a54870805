"""The heat maps of a report: parameters, statistics and routing over layers and roles, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from mergekit.families.roles import ROLES
from mergekit.output.report.data import AFTER, BEFORE, ReportData, Tensor
from mergekit.output.stats import pooled

__all__ = ["Grid", "constant_parameters", "feeding", "parameter_grids", "routing_grids", "statistics_grids"]

Value = float | None
Kind = Literal["amount", "signed", "models"]


@dataclass(frozen=True, slots=True)
class Grid:
    """A heat map. ``values`` [rows][columns] are None where there is nothing; ``texts`` are what people read there.

    ``domain`` are the values of the first and the last colour. ``kind``: colours for an ``amount``, for what goes both
    ways from the middle of the domain (``signed``), or for ``models``, by number, with the text in the cell.
    """

    title: str
    note: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[Value, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    domain: tuple[float, float]
    kind: Kind = "amount"


Cells = Mapping[tuple[str, str], tuple[float, str]]
"""Values and their texts by row and column."""


def _grid(
    title: str, note: str, rows: Sequence[str], columns: Sequence[str], cells: Cells, domain: tuple[float, float],
    kind: Kind = "amount",
) -> Grid:  # fmt: skip
    return Grid(
        title,
        note,
        tuple(rows),
        tuple(columns),
        tuple(tuple(cells[row, column][0] if (row, column) in cells else None for column in columns) for row in rows),
        tuple(tuple(cells[row, column][1] if (row, column) in cells else "" for column in columns) for row in rows),
        domain,
        kind,
    )


def _over_roles(
    data: ReportData, title: str, note: str, cells: Cells, domain: tuple[float, float], kind: Kind = "amount"
) -> Grid:
    """A grid of layers and roles, those with no value left out."""
    used = {column for _, column in cells}
    rows_used = {row for row, _ in cells}
    rows = [row for row in data.rows if row in rows_used or row not in (BEFORE, AFTER)]
    return _grid(title, note, rows, [role for role in ROLES if role in used], cells, domain, kind)


def _by_cell(tensors: Iterable[Tensor]) -> dict[tuple[str, str], list[Tensor]]:
    found: dict[tuple[str, str], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.row, tensor.role), []).append(tensor)
    return found


# Parameters


def _parameter_values(data: ReportData) -> dict[tuple[str, int | None], list[tuple[Tensor, Any]]]:
    found: dict[tuple[str, int | None], list[tuple[Tensor, Any]]] = {}
    for tensor in data.tensors:
        for key, value in tensor.parameters.items():
            found.setdefault(key, []).append((tensor, value))
    return found


def constant_parameters(data: ReportData) -> list[tuple[str, str, str]]:
    """Parameters with one value for all tensors, or that no colour can show: name, whose it is, value."""
    rows = []
    for (name, model), values in _parameter_values(data).items():
        distinct = list(dict.fromkeys(shown(value) for _, value in values))
        if len(distinct) == 1 or not _is_numeric(values):
            rows.append((name, "all" if model is None else data.names[model], ", ".join(distinct)))
    return rows


def parameter_grids(data: ReportData) -> list[Grid]:
    """A heat map of each number that varies over the tensors; those of one parameter share their colours."""
    varying: dict[str, list[tuple[int | None, list[tuple[Tensor, Any]]]]] = {}
    for (name, model), values in _parameter_values(data).items():
        if _is_numeric(values) and len({value for _, value in values}) > 1:
            varying.setdefault(name, []).append((model, values))
    grids = []
    for name, found in varying.items():
        numbers = [float(value) for _, values in found for _, value in values]
        for model, values in found:
            title = name if model is None else f"{name} of {data.names[model]}"
            by_cell: dict[tuple[str, str], list[float]] = {}
            for tensor, value in values:
                by_cell.setdefault((tensor.row, tensor.role), []).append(float(value))
            cells = {cell: (sum(each) / len(each), _span(each)) for cell, each in by_cell.items()}
            grids.append(_over_roles(data, title, "", cells, (min(numbers), max(numbers))))
    return grids


def _is_numeric(values: Sequence[tuple[Tensor, Any]]) -> bool:
    return all(isinstance(value, (int, float)) and math.isfinite(value) for _, value in values)


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return shown(low) if low == high else f"{shown(low)} to {shown(high)}"


def shown(value: Any) -> str:
    """A value as people read it: numbers to four digits.

    >>> shown(0.123456), shown(None), shown(True), shown(1.0)
    ('0.1235', 'none', 'yes', '1')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


# Statistics


Figures = Mapping[tuple[str, str], Mapping[str, Any]]
"""Pooled figures by row and column."""


def statistics_grids(data: ReportData) -> list[Grid]:
    """A heat map of each figure that was gathered; a cell takes its tensors as one vector."""
    measured = [tensor for tensor in data.tensors if tensor.figures is not None]
    found: Figures = {
        cell: pooled([tensor.figures for tensor in some if tensor.figures]) for cell, some in _by_cell(measured).items()
    }
    onto = {cell: figures for cell, figures in found.items() if "change" in figures}
    ratio = {cell: figures["norm_ratio"] for cell, figures in found.items()}
    note = "Length of the result over the mean of the models' lengths."
    return [
        *_distances(data, onto),
        *_cosines(data, onto or found),
        *_shares(data, onto),
        *_measured(data, "Norm ratio", note, ratio, _around(1.0, ratio.values()), "signed"),
    ]


def _measured(
    data: ReportData,
    title: str,
    note: str,
    values: Mapping[tuple[str, str], Value],
    domain: tuple[float, float],
    kind: Kind = "amount",
) -> Iterator[Grid]:
    """The grid of what has a finite value, if anything has."""
    cells = {cell: (float(value), shown(value)) for cell, value in values.items() if _is_finite(value)}
    if cells:
        yield _over_roles(data, title, note, cells, domain, kind)


def _distances(data: ReportData, onto: Figures) -> Iterator[Grid]:
    """How far the models and the result are from the base."""
    base = data.base
    if not onto or base is None:
        return
    lengths = {cell: figures["norms"].get(base) for cell, figures in onto.items()}
    moved = {
        f"How far {data.names[model]} moved": {
            cell: _ratio(figures["deltas"].get(model), lengths[cell]) for cell, figures in onto.items()
        }
        for model in _models_of(onto, "deltas")
    }
    moved["How far the result moved"] = {cell: _ratio(f["change"], lengths[cell]) for cell, f in onto.items()}
    most = max((x for values in moved.values() for x in values.values() if _is_finite(x)), default=0.0) or 1.0
    note = f"The length of the change, over the length of the weights of {data.names[base]}."
    for title, values in moved.items():
        yield from _measured(data, title, note, values, (0.0, most))


def _cosines(data: ReportData, found: Figures) -> Iterator[Grid]:
    what = "changes" if any("change" in figures for figures in found.values()) else "weights"
    note = f"Between their {what}: 1 the same direction, 0 unrelated, -1 opposite."
    for a, b in _models_of(found, "cosines"):
        values = {cell: figures["cosines"].get((a, b)) for cell, figures in found.items()}
        title = f"Cosine of {data.names[a]} and {data.names[b]}"
        yield from _measured(data, title, note, values, (-1.0, 1.0), "signed")


def _shares(data: ReportData, onto: Figures) -> Iterator[Grid]:
    """Sign conflicts, what a method keeps, and what rounding leaves."""
    if len(_models_of(onto, "deltas")) > 1:
        note = "Of the entries that two models or more change, the share where they disagree on the sign."
        torn = {cell: figures["sign_conflict"] for cell, figures in onto.items()}
        yield from _measured(data, "Sign conflicts", note, torn, (0.0, 1.0))
    for model in _models_of(onto, "kept"):
        kept = {cell: figures.get("kept", {}).get(model) for cell, figures in onto.items()}
        note = "The share of its entries that the method keeps."
        yield from _measured(data, f"Kept of {data.names[model]}", note, kept, (0.0, 1.0))
    left = {cell: figures["survival"] for cell, figures in onto.items()}
    note = "How much of the intended change is left after rounding to the output's type: 1 is all of it."
    yield from _measured(data, "Survival", note, left, _around(1.0, left.values()), "signed")


def _models_of(found: Figures, name: str) -> list[Any]:
    """The models, or pairs of models, that have the figure ``name`` somewhere."""
    return list(dict.fromkeys(model for figures in found.values() for model in figures.get(name, ())))


def _is_finite(value: Value) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _ratio(part: Value, whole: Value) -> Value:
    return None if part is None or not whole else part / whole


def _around(middle: float, values: Iterable[Value]) -> tuple[float, float]:
    """As far to both sides of ``middle`` as the values go, but not less than 0.05."""
    reach = max([0.05, *(abs(value - middle) for value in values if _is_finite(value))])
    return middle - reach, middle + reach


# Origins


def feeding(data: ReportData) -> Grid | None:
    """Which layers of which models each layer is made of; None where each is made of those of its own number."""
    layers: dict[tuple[str, int], dict[int, None]] = {}
    for tensor in data.tensors:
        for model, layer in tensor.origins:
            if layer is not None:
                layers.setdefault((tensor.row, model), {})[layer] = None
    rows = [row for row in data.rows if row not in (BEFORE, AFTER)]
    models = list(dict.fromkeys(model for _, model in layers))
    is_plain = all(list(found) == [int(row)] for (row, _), found in layers.items() if row.isdecimal())
    if not layers or (is_plain and len(layers) == len(rows) * len(models)):
        return None
    names = _ends(data.names)
    cells = {(row, names[model]): (float(model), ", ".join(map(str, found))) for (row, model), found in layers.items()}
    note = "A row is a layer of the result; the number is that of the layer it is taken from."
    columns = [names[model] for model in sorted(models)]
    return _grid("Where each layer comes from", note, rows, columns, cells, (0.0, len(data.models) - 1.0), "models")


def _ends(names: Sequence[str]) -> Sequence[str]:
    """What stands after the last slash of each name, where that tells them apart: columns are narrow."""
    ends = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return ends if len(set(ends)) == len(set(names)) else names


# Routing


def routing_grids(data: ReportData) -> list[Grid]:
    """Where held-out prompts go, by layer and expert."""
    report = data.routing
    if report is None or report.accuracy is None:
        return []
    names = [f"{number} {name}" for number, name in enumerate(_ends(report.experts))]
    rows = [str(number) for number in range(len(report.layers))]
    even = 1 / len(names)

    def grid(title: str, note: str, lists: Sequence[Sequence[Value]], domain: tuple[float, float], kind: Kind) -> Grid:
        cells = {
            (row, name): (value, f"{value:.1%}")
            for row, values in zip(rows, lists, strict=True)
            for name, value in zip(names, values, strict=True)
            if _is_finite(value)
        }
        return _grid(title, note, rows, names, cells, domain, kind)

    return [
        grid("Tokens that find their expert",
             f"The share of the tokens of an expert's prompts whose likeliest expert it is; {even:.0%} by chance.",
             [layer.accuracy for layer in report.layers], (0.0, 1.0), "amount"),
        grid("Load", f"The share of all tokens that an expert gets; {even:.1%} if they are spread evenly.",
             [layer.load for layer in report.layers], (0.0, 2 * even), "signed"),
    ]  # fmt: skip
