"""``mergekit report``: a page about a merged model."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit.cli.boundary import plain, tell


@click.command("report", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("folder", type=click.Path())
@click.option("-o", "--out", type=Path, metavar="FILE", help="Where to write (default: FOLDER/merge_report.html).")
@click.option("--transformers-cache", type=Path, metavar="PATH", help="Cache folder for hub downloads.")
@click.option("--method-file", type=Path, multiple=True, help="Python file that defines merge methods; it is run.")
def report(folder: str, out: Path | None, transformers_cache: Path | None, method_file: tuple[Path, ...]) -> None:
    """Write a page about the merged model in FOLDER, to open in a browser: it loads nothing and needs no network.

    It tells what merge_stats.json, merge_manifest.json and the recipe in FOLDER say. If the models are where the recipe
    says, looked for from the current folder, it also shows which layers and parameters each tensor was made of. A
    report that shows them is not replaced by one that does not, unless -o names its file.
    """
    from mergekit.api import RunOptions, report_model

    options = RunOptions(cache_dir=transformers_cache, method_files=method_file)
    path = report_model(Path(folder), options, out, warn=lambda text: tell("warning", text))
    click.echo(plain(str(path)))
