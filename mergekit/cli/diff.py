"""``mergekit diff``: how models differ, before merging them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import click

from mergekit.cli.boundary import plain, say
from mergekit.cli.progress import downloads, progress
from mergekit.cli.show import size, sparkline, table

if TYPE_CHECKING:
    from mergekit.api.comparison import Comparison, Figures

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.command("diff", context_settings=_SETTINGS)
@click.argument("models", type=click.Path(), nargs=-1, metavar="FIRST OTHER...")
@click.option("--layers", is_flag=True, help="Print a table of layers, too.")
@click.option("--tensors", is_flag=True, help="Print a table of tensors, too.")
@click.option("--spectrum", is_flag=True, help="Find the ranks of the changes, too (slow).")
@click.option("--no-base", is_flag=True, help="FIRST is one of their kind, not what the OTHERs were made from.")
@click.option("--json", "as_json", is_flag=True, help="Print everything, tensor by tensor, as JSON.")
@click.option("--html", type=Path, metavar="FILE", help="Write a page with heat maps over layers and roles.")
@click.option("-j", "--num-threads", type=click.IntRange(min=1), help="Threads (default: one for each processor).")
@click.option("--cache-dir", type=Path, metavar="PATH", help="Where files of hub models are kept.")
@click.option("--quiet", is_flag=True, help="No progress and no notes.")
def diff(models: tuple[str, ...], layers: bool, tensors: bool, spectrum: bool, no_base: bool, as_json: bool,
         html: Path | None, num_threads: int | None, cache_dir: Path | None, quiet: bool) -> None:  # fmt: skip
    """Print how the models OTHER... differ from the model FIRST, usually their base. Every weight is read once.

    Models are folders or hub names, with +ADAPTER where an adapter belongs to one.
    """
    from mergekit import api

    if html is not None:  # before gigabytes are read
        api.check_drawable()
        api.check_page(html)
    started = time.monotonic()
    with downloads(shown=not quiet) as told:
        pairing = api.pair(*models, cache_dir=cache_dir, told=told)
    with progress(pairing.nbytes, shown=not quiet, what="reading") as meter:
        comparison = api.compare_pairing(
            pairing,
            common_base=not no_base,
            spectrum=spectrum,
            threads=num_threads,
            on_compile=meter.compiling,
            advance=meter,
        )
    if html is not None:
        api.write_comparison(comparison, html)
    if as_json:
        click.echo(json.dumps({**comparison.record(), "reading": api.reading(comparison)}, indent=1))
    else:
        click.echo("\n".join(plain(line) for line in comparison_lines(comparison, layers=layers, tensors=tensors)))
    if not quiet:
        say(f"read {size(pairing.nbytes)} in {time.monotonic() - started:.1f} s{f'; wrote {html}' if html else ''}")


def comparison_lines(comparison: Comparison, *, layers: bool = False, tensors: bool = False) -> list[str]:
    """A comparison for people: models, roles with a curve over the layers, pairs, the reading, and what to try."""
    from mergekit.api import advise, percent, reading

    total, names = comparison.matrices, comparison.models
    lines = table(
        [f"against {names[0]}", "moved", "cosine", "entries changed"],
        [
            [f"[{m}] {names[m]}", percent(total.moved(m)), _number(total.similarity(m)), percent(total.changed(m))]
            for m in comparison.others
        ],
    )
    if comparison.pairs:
        rows = [
            [f"[{a}] and [{b}]", _number(total.cosine(a, b)), percent(total.conflict(a, b))]
            for a, b in comparison.pairs
        ]
        lines += ["", *table(["changes of", "cosine", "opposite signs"], rows)]
    lines += ["", *_roles(comparison)]
    if layers:
        found = comparison.by_layer().items()
        lines += ["", *_parts(comparison, "layer", ((str(layer), figures) for layer, figures in found))]
    if tensors:
        lines += ["", *_parts(comparison, "tensor", comparison.by_tensor().items())]
    if comparison.spectra:
        lines += ["", *_ranks(comparison)]
    lines += ["", *_listed([*reading(comparison), *comparison.remarks])]
    advice = advise(comparison)
    lines += ["", f"try {advice.method}:" if advice.method else "no merge of weights to try:"]
    return lines + _listed(advice.reasons)


def _listed(sentences: Iterable[str]) -> list[str]:
    """Sentences as a list, folded."""
    return [line for text in sentences for line in wrap(text, 100, initial_indent="* ", subsequent_indent="  ")]


def _roles(comparison: Comparison) -> list[str]:
    """How far each role moved, with a curve from the first layer to the last."""
    from mergekit.api import percent

    cells = comparison.group(lambda p: None if p.layer is None else (p.role, p.layer))
    tops = {m: max((f.moved(m) or 0.0 for f in cells.values()), default=0.0) for m in comparison.others}
    rows = []
    for role, figures in comparison.by_role().items():
        row = [role]
        for m in comparison.others:
            curve = [f.moved(m) or 0.0 for (name, _), f in sorted(cells.items()) if name == role]
            row += [percent(figures.moved(m)), sparkline(curve, tops[m])]
        rows.append(row)
    head = [f"[{m}] moved" for m in comparison.others]
    return table(["role", *(text for name in head for text in (name, "by layer"))], rows)


def _parts(comparison: Comparison, what: str, parts: Iterable[tuple[str, Figures]]) -> list[str]:
    """How far each of some parts moved, and how the changes agree there."""
    from mergekit.api import percent

    head = [what, *(f"[{m}] moved" for m in comparison.others), *(f"cosine [{a}] [{b}]" for a, b in comparison.pairs)]
    rows = [
        [
            name,
            *(percent(figures.moved(m)) for m in comparison.others),
            *(_number(figures.cosine(a, b)) for a, b in comparison.pairs),
        ]
        for name, figures in parts
    ]
    return table(head, rows)


def _ranks(comparison: Comparison) -> list[str]:
    """The ranks of the changes: stable rank, and how many singular values hold nine tenths of the squared length."""
    head = ["rank of the change", "full", *(f"[{m}] stable, 90 %" for m in comparison.others)]
    rows = []
    for name, found in comparison.spectra.items():
        full = next(iter(found.values())).full_rank
        cells = [f"{found[m].stable_rank:.1f}, {found[m].rank_90}" if m in found else "-" for m in comparison.others]
        rows.append([name, str(full), *cells])
    return table(head, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
