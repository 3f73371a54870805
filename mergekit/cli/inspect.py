"""``mergekit inspect``: what a model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit.cli.boundary import plain
from mergekit.cli.show import table

if TYPE_CHECKING:
    from mergekit.api.inspect import ModelSummary


@click.command("inspect", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("model", type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--cache-dir", type=Path, metavar="PATH", help="Where files of hub models are kept.")
def inspect(model: str, tensors: bool, as_json: bool, cache_dir: Path | None) -> None:
    """Print what MODEL is: a folder or hub name, +ADAPTER if one belongs to it, or an adapter. No weight is read."""
    from mergekit.api.inspect import inspect_model

    summary = inspect_model(model, cache_dir=cache_dir)
    if as_json:
        click.echo(json.dumps(summary.record(), indent=1))
        return
    click.echo("\n".join(plain(line) for line in summary_lines(summary, tensors=tensors)))


def summary_lines(summary: ModelSummary, *, tensors: bool = False) -> list[str]:
    """A model for people: facts, then what its layers are made of, or all tensors."""
    facts = summary.facts()
    width = max(len(word) for word, _ in facts)
    lines = [summary.name, *(f"  {word:{width}}  {text}" for word, text in facts), ""]
    if tensors:
        rows = [[name, _shape(shape), dtype, file] for name, shape, dtype, file in summary.tensors]
        return lines + table(["tensor", "shape", "type", "file"], rows, numbers=0)
    rows = [[p.name, p.role, _shape(p.shape), p.dtype, f"{p.count:,}"] for p in summary.parts]
    return lines + table(["tensors", "role", "shape", "type", "count"], rows, numbers=1)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
