"""The page: facts, words and charts put into one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from mergekit.errors import UsageError
from mergekit.methods import Method, get_method
from mergekit.output.report.charts import draw
from mergekit.output.report.data import ReportData
from mergekit.output.report.grids import (
    Grid,
    constant_parameters,
    feeding,
    parameter_grids,
    routing_grids,
    statistics_grids,
)
from mergekit.output.report.words import findings, summary, totals

__all__ = ["figures", "page", "render"]


def page(data: ReportData) -> str:
    """The report as HTML. Every name and text in it is escaped; its policy forbids to load or run anything else."""
    method = _method(data.method)
    origins = feeding(data)
    return render(
        "page.html.j2",
        version=data.version,
        data=data,
        method=method,
        about=method.summary.replace("``", "'") if method and not data.mixture else "",
        summary=summary(data, method.title if method else data.method),
        findings=findings(data),
        totals=totals(data),
        origins=figures("o", [origins] if origins else []),
        constants=constant_parameters(data),
        parameters=figures("p", parameter_grids(data)),
        statistics=figures("s", statistics_grids(data)),
        routing=figures("r", routing_grids(data)),
    )


def render(template: str, **facts: Any) -> str:
    """One of the templates here, with the style and the script that its policy allows."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    style, script = _resource("style.css"), _resource("page.js")
    environment = Environment(
        loader=FunctionLoader(_resource),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        **facts, style=style, script=script, style_hash=_digest(style), script_hash=_digest(script)
    )


def figures(prefix: str, grids: Sequence[Grid]) -> list[tuple[str, Grid, str]]:
    """Each grid with its key in the page and its chart."""
    return [(f"{prefix}{number}", grid, draw(grid, f"{prefix}{number}")) for number, grid in enumerate(grids)]


def _method(name: str) -> Method | None:
    try:
        return get_method(name)
    except UsageError:  # one of the user's own, whose file is not loaded
        return None


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    """What a content security policy calls an inline text by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
