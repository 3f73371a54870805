"""Grids as SVG, drawn by altair once, when the report is written; the page then needs no library."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from mergekit.errors import UsageError
from mergekit.output.report.grids import Grid

__all__ = ["check_drawable", "draw"]

_WIDE, _HIGH, _LOW = 24, 14, 8
"""A cell in pixels; rows are low where there are more than ``_MANY``, and then every fifth has a label."""
_MANY = 48
_SCHEMES = {"amount": "viridis", "signed": "purpleorange"}
_MODELS = ("#4269d0", "#b45309", "#15803d", "#a21caf", "#b91c1c", "#0e7490", "#6d28d9", "#4d7c0f")
"""Dark enough for white text; the ninth model has the first colour again, and its own column."""
_NOISE = ("aria-label", "aria-hidden", "aria-roledescription", "role", "pointer-events", "font-family", "opacity")
_FONT = "11px"
"""The size of labels; the page's style says it once, and that they have the colour of the text around."""
_INK = "#000"
_RGB = re.compile(r"rgb\((\d+), (\d+), (\d+)\)")
_SVG = "http://www.w3.org/2000/svg"


def check_drawable() -> None:
    """UsageError, naming the extra to install, where the charts' library is missing."""
    missing = [name for name in ("altair", "vl_convert") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"a report needs {' and '.join(missing)} for its charts; install them with: pip install 'mergekit[report]'"
        )


def draw(grid: Grid, key: str) -> str:
    """The grid as an ``<svg>`` whose group ``cells`` has a path for each value, row by row.

    ``key`` makes its ids unique in the page. The page's style gives labels their font and colour.
    """
    import vl_convert

    return _slim(vl_convert.vegalite_to_svg(_chart(_as_xml(grid)).to_dict(validate=False)), key)


def _as_xml(grid: Grid) -> Grid:
    """The grid with names that XML can hold: some characters can't be written there at all, and the library aborts."""
    return replace(
        grid,
        rows=tuple(map(_printable, grid.rows)),
        columns=tuple(map(_printable, grid.columns)),
        texts=tuple(tuple(map(_printable, line)) for line in grid.texts),
    )


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _chart(grid: Grid) -> Any:
    import altair as alt

    cells = [
        {"row": row, "column": column, "value": value, "text": text}
        for row, values, texts in zip(grid.rows, grid.values, grid.texts, strict=True)
        for column, value, text in zip(grid.columns, values, texts, strict=True)
        if value is not None
    ]
    axis: dict[str, Any] = {"title": None, "ticks": False, "domain": False, "labelLimit": 110, "labelFontSize": 11}
    top = alt.Axis(orient="top", labelAngle=-45, labelOverlap=False, **axis)
    is_low = len(grid.rows) > _MANY and grid.kind != "models"
    left = alt.Axis(labelOverlap=False, values=_fifths(grid.rows) if is_low else list(grid.rows), **axis)
    base = alt.Chart({"values": cells}).encode(
        x=alt.X("column:N", scale=alt.Scale(domain=list(grid.columns)), axis=top),
        y=alt.Y("row:N", scale=alt.Scale(domain=list(grid.rows)), axis=left),
    )
    chart = _numbered(base, len(grid.columns)) if grid.kind == "models" else _coloured(base, grid)
    width = 3 * _WIDE if grid.kind == "models" else _WIDE
    chart = chart.properties(width=alt.Step(width), height=alt.Step(_LOW if is_low else _HIGH))
    return chart.configure_view(stroke=None).configure(background="transparent", padding=2)


def _fifths(rows: Sequence[str]) -> list[str]:
    """The rows to label where there is no room for all."""
    ends = {0, len(rows) - 1}
    return [row for place, row in enumerate(rows) if place in ends or (place > 2 and row.endswith(("0", "5")))]


def _coloured(base: Any, grid: Grid) -> Any:
    import altair as alt

    low, high = grid.domain
    scheme: Any = _SCHEMES[grid.kind]
    legend = alt.Legend(
        title=None,
        orient="bottom",
        gradientLength=130,
        gradientThickness=9,
        values=[low, high] if grid.kind == "amount" else [low, (low + high) / 2, high],
        format=".3~g",
        labelFontSize=11,
    )
    colour = alt.Color("value:Q", scale=alt.Scale(scheme=scheme, domain=[low, high], clamp=True), legend=legend)
    return base.mark_rect().encode(color=colour)


def _numbered(base: Any, models: int) -> Any:
    """A colour for each model, and the cells' texts in white."""
    import altair as alt

    colours = [_MODELS[number % len(_MODELS)] for number in range(models)]
    boxes = base.mark_rect().encode(color=alt.Color("column:N", scale=alt.Scale(range=colours), sort=None, legend=None))
    return boxes + base.mark_text(fontSize=10, color="white").encode(text="text:N")


def _slim(svg: str, key: str) -> str:
    """Without what the page says better itself: roles, fonts, ink; with ids that depend on ``key`` alone."""
    ET.register_namespace("", _SVG)
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.get("display") == "none" or child.get("d") == "" or child.get("class") == "background":
                parent.remove(child)
    named = [node for node in root.iter() if "id" in node.attrib]
    ids = {f"url(#{node.get('id')})": f"{key}-{number}" for number, node in enumerate(named)}
    for node in root.iter():
        for name in _NOISE:
            node.attrib.pop(name, None)
        is_cells = "mark-rect" in node.attrib.pop("class", "")
        if is_cells:
            node.set("class", "cells")
        if node.get("fill") == _INK:
            del node.attrib["fill"]
        if node.get("font-size") == _FONT:
            del node.attrib["font-size"]
        if "id" in node.attrib:
            node.set("id", ids[f"url(#{node.get('id')})"])
        if "offset" in node.attrib:
            node.set("offset", f"{float(node.get('offset', 0)):.3g}")
        for name in ("fill", "stop-color"):
            value = node.get(name, "")
            if match := _RGB.fullmatch(value):
                node.set(name, "#" + "".join(f"{int(part):02x}" for part in match.groups()))
            elif value in ids:
                node.set(name, f"url(#{ids[value]})")
    root.attrib.pop("version", None)
    root.set("aria-hidden", "true")
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", ET.tostring(root, encoding="unicode"), count=2)
    return text.replace(" />", "/>")
