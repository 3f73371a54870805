"""The page: facts, words and charts put into one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

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

__all__ = ["REPORT", "page"]

REPORT = "merge_report.html"


def page(data: ReportData) -> str:
    """The report as HTML. Every name and text in it is escaped; its policy forbids to load or run anything else."""
    from jinja2 import Environment, StrictUndefined

    template, style, script = (_resource(name) for name in ("page.html.j2", "style.css", "page.js"))
    method = _method(data.method)
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    origins = feeding(data)
    return environment.from_string(template).render(
        data=data,
        method=method,
        about=method.summary.replace("``", "'") if method and not data.mixture else "",
        summary=summary(data, method.title if method else data.method),
        findings=findings(data),
        totals=totals(data),
        origins=_figures("o", [origins] if origins else []),
        constants=constant_parameters(data),
        parameters=_figures("p", parameter_grids(data)),
        statistics=_figures("s", statistics_grids(data)),
        routing=_figures("r", routing_grids(data)),
        style=style,
        script=script,
        style_hash=_digest(style),
        script_hash=_digest(script),
    )


def _figures(prefix: str, grids: list[Grid]) -> list[tuple[str, Grid, str]]:
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
