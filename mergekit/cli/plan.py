"""``mergekit plan``: what a merge would do."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit.cli.boundary import plain, tell
from mergekit.cli.help import MergeCommand
from mergekit.cli.show import size
from mergekit.options import add_merge_options

if TYPE_CHECKING:
    from mergekit.planning.plan import Plan


@click.command(
    "plan", cls=MergeCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.argument("config_file", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print everything, tensor by tensor, as JSON.")
@click.option(
    "--html", type=Path, metavar="FILE", help="Write a page about it, too: sources and parameters to look at."
)
@add_merge_options
def plan(config_file: str, as_json: bool, html: Path | None, merge_options: Any) -> None:
    """Print what merging the recipe CONFIG_FILE would do, without reading a weight.

    Models on the hub are planned from the headers of their files, before anything large is downloaded.
    """
    from mergekit import api

    if html:
        api.check_page(html)
    options = merge_options.run_options()
    made = api.plan(config_file, options)
    if html:
        api.report_plan(made, html, Path(config_file).stem)
    if as_json:
        from mergekit.planning.describe import describe

        click.echo(json.dumps({**describe(made), "memory": api.memory(made, options)}, indent=1))
        return
    click.echo("\n".join(plan_lines(made, options)))
    report(made, notes=() if merge_options.quiet else [*merge_options.given_without_effect(), *made.notes])


def report(plan: Plan, *, notes: Iterable[str]) -> None:
    """Print a plan's warnings, how long it takes if that is long, and ``notes``, on stderr."""
    from mergekit import api

    for text in plan.warnings:
        tell("warning", text)
    if slow := api.slow_part(plan):
        tell("note", slow)
    for text in notes:
        tell("note", text)


def _small_files(plan: Plan) -> list[str]:
    """Where the small files come from, a line for each source."""
    by_source: dict[int, list[str]] = {plan.donor: ["config.json"]}
    for source, name in plan.files:
        by_source.setdefault(source, []).append(name)
    lines = [f"  {', '.join(names)} from {plan.sources[source].reference}" for source, names in by_source.items()]
    return lines + ([f"  {', '.join(name for name, _ in plan.texts)} written anew"] if plan.texts else [])


def plan_lines(plan: Plan, options: Any) -> list[str]:
    """A plan for people: models, groups of like tensors with their parameters, files, sizes."""
    from mergekit import api
    from mergekit.planning.describe import groups, kind_of_merge, made_of

    lines = [f"{kind_of_merge(plan)}, seed {plan.seed}"]
    for number, source in enumerate(plan.sources):
        lines.append(f"  [{number}] {source.reference}{_part(plan, number)}")
    lines.append("")
    for group in groups(plan):
        lines.append(f"{len(group.tensors):4} x {group.template}  {list(group.shape)} {group.dtype}")
        lines.append(f"       {made_of(group, plan)}")
    lines.append("")
    lines += [f"  {shard.name}  {size(shard.size)}" for shard in plan.shards[:6]]
    if len(plan.shards) > 6:
        lines.append(f"  and {len(plan.shards) - 6} more shards")
    lines += _small_files(plan)
    if plan.left_out:
        lines.append(f"  {len(plan.left_out)} input tensors are not used (--json lists them)")
    lines.append(
        f"{plan.parameters:,} parameters; reads {size(plan.bytes_read)} (as often as the method needs), "
        f"writes {size(plan.bytes_written)}, needs about {size(api.memory(plan, options))} of memory"
    )
    return [plain(line) for line in lines]


def _part(plan: Plan, number: int) -> str:
    """The part that a source plays, in brackets."""
    parts = ["base"] if number == plan.base else []
    if plan.mixture is not None:
        parts += [f"expert {e}" for e, source in enumerate(plan.mixture.experts) if source == number]
    if plan.sources[number].prepared:
        parts.append("made first")
    if plan.sources[number].adapter:
        parts.append("adapter")
    return f" ({', '.join(parts)})" if parts else ""
