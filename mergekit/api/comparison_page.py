"""A comparison as a page to look at, in the frame of merge reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit.api.advice import advise, percent, reading
from mergekit.api.comparison import Comparison, Figures
from mergekit.api.pages import write_page
from mergekit.families.roles import ROLES
from mergekit.version import __version__

if TYPE_CHECKING:
    from mergekit.output.report import Grid

__all__ = ["write_comparison"]


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write a page with heat maps over layers and roles to ``path``. UsageError without ``mergekit[report]``."""
    from mergekit.output.report import check_drawable, figures, render

    check_drawable()
    names, total = comparison.models, comparison.matrices
    moved = [
        _grid(comparison, f"How far {names[m]} moved", lambda f, m=m: f.moved(m), top=_most(comparison))  # type: ignore[misc]
        for m in comparison.others
    ]
    agreement: list[Grid] = []
    for a, b in comparison.pairs:
        title = f"Cosine of the changes of {names[a]} and {names[b]}"
        agreement.append(_grid(comparison, title, lambda f, a=a, b=b: f.cosine(a, b), signed=True))  # type: ignore[misc]
    text = render(
        "comparison.html.j2",
        version=__version__,
        names=names,
        reading=reading(comparison),
        advice=advise(comparison),
        models=[
            [names[m], percent(total.moved(m)), _number(total.similarity(m)), percent(total.changed(m))]
            for m in comparison.others
        ],
        pairs=[
            [f"{names[a]} and {names[b]}", _number(total.cosine(a, b)), percent(total.conflict(a, b))]
            for a, b in comparison.pairs
        ],
        moved=figures("m", moved),
        agreement=figures("a", agreement),
        remarks=comparison.remarks,
    )
    write_page(path, text)


def _most(comparison: Comparison) -> float:
    """The farthest that any cell moved: all maps have the same colours."""
    cells = comparison.group(lambda place: (place.row, place.role)).values()
    return max((figures.moved(m) or 0.0 for figures in cells for m in comparison.others), default=0.0) or 1.0


def _grid(
    comparison: Comparison,
    title: str,
    figure: Callable[[Figures], float | None],
    *,
    top: float = 1.0,
    signed: bool = False,
) -> Grid:
    """The heat map of one figure over layers and roles."""
    from mergekit.output.report import Grid

    cells = {key: figure(f) for key, f in comparison.group(lambda place: (place.row, place.role)).items()}
    present = {row for row, _ in cells}
    rows = [row for row in comparison.rows if row in present]
    columns = [role for role in ROLES if any(role == column for _, column in cells)]
    values = tuple(tuple(cells.get((row, column)) for column in columns) for row in rows)
    shown = _number if signed else percent
    texts = tuple(tuple("" if value is None else shown(value) for value in line) for line in values)
    domain = (-1.0, 1.0) if signed else (0.0, top)
    kind = "signed" if signed else "amount"
    return Grid(title, "", tuple(rows), tuple(columns), values, texts, domain, kind)  # type: ignore[arg-type]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
