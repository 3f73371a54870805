"""``mergekit merge`` and ``mergekit-yaml``: merge a recipe into a folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from mergekit.cli.boundary import as_events, program, resumable, say, tell
from mergekit.cli.help import MergeCommand
from mergekit.cli.plan import plan_lines, report
from mergekit.cli.progress import downloads, progress
from mergekit.cli.run import announce, conclude, events_option
from mergekit.errors import UsageError
from mergekit.options import add_merge_options
from mergekit.version import __version__

_YAML = (".yml", ".yaml")


@click.command(
    "merge", cls=MergeCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.argument("config_file", type=click.Path())
@click.argument("out_path", type=click.Path())
@click.option("--dry-run", is_flag=True, help="Print the plan and stop before anything is written.")
@events_option
@click.version_option(__version__, prog_name="mergekit")
@add_merge_options
def merge(config_file: str, out_path: str, dry_run: bool, merge_options: Any) -> None:
    """Merge the models of the recipe CONFIG_FILE (YAML) into the folder OUT_PATH.

    The same command continues a run that was interrupted.
    """
    merge_recipe(config_file, out_path, dry_run, merge_options)


@resumable()
def merge_recipe(recipe: str | dict[str, Any], out_path: str, dry_run: bool, merge_options: Any) -> None:
    """Plan a recipe, a path or a mapping, and run it unless ``dry_run``; say what is done."""
    from mergekit import api

    started = time.monotonic()
    options = merge_options.run_options()
    if not out_path:
        raise UsageError("OUT_PATH is empty; give a folder for the output")
    if isinstance(recipe, str) and Path(out_path).is_file() and out_path.endswith(_YAML) and not recipe.endswith(_YAML):
        raise UsageError(
            f"{out_path} is a file; the recipe comes first, then the folder for the output: "
            f"mergekit merge {out_path} {recipe}"
        )
    api.check_writable(Path(out_path), options)
    quiet = merge_options.quiet
    with downloads(shown=not quiet) as told:
        plan = api.plan(recipe, options, fetch=not dry_run, told=told)
    announce(plan, options, dry_run=dry_run, quiet=quiet)
    report(plan, notes=() if quiet else [*merge_options.given_without_effect(), *plan.notes])
    if dry_run:
        return
    if merge_options.verbosity and not quiet and not as_events():
        say("\n".join(plan_lines(plan, options)))
    with progress(sum(output.nbytes for output in plan.outputs), shown=not quiet) as meter:
        remarks = api.run_plan(plan, Path(out_path), options, meter.hooks())
    for text in remarks:
        tell("warning", text)
    conclude(plan, out_path, time.monotonic() - started, report=options.report, quiet=quiet)


def main() -> None:
    """The program ``mergekit-yaml``."""
    program(merge, "mergekit-yaml")
