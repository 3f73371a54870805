"""``mergekit plan``: what a merge would do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mergekit.cli.boundary import say
from mergekit.options import add_merge_options

if TYPE_CHECKING:
    from mergekit.planning import Plan


@click.command("plan", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("config_file")
@click.option("--json", "as_json", is_flag=True, help="Print everything, tensor by tensor, as JSON.")
@add_merge_options
def plan(config_file: str, as_json: bool, merge_options: Any) -> None:
    """Print what merging the recipe CONFIG_FILE would do, without reading a weight.

    Models on the hub are planned from the headers of their files, before anything large is downloaded.
    """
    from mergekit import api

    options = merge_options.run_options()
    made = api.plan(config_file, options)
    if as_json:
        from mergekit.planning.describe import describe

        click.echo(json.dumps({**describe(made), "memory": api.memory(made, options)}, indent=1))
    else:
        print_plan(made, options)


def print_plan(plan: Plan, options: Any) -> None:
    """Print a plan for people: the plan on stdout, warnings and notes on stderr."""
    from mergekit import api
    from mergekit.planning.describe import groups, span_text

    base = f", base {plan.sources[plan.base].reference}" if plan.base is not None else ""
    click.echo(f"{plan.method} of {len(plan.sources)} model(s){base}, seed {plan.seed}")
    for number, source in enumerate(plan.sources):
        click.echo(f"  [{number}] {source.reference}")
    click.echo()
    for group in groups(plan):
        models = " ".join(f"[{s}]" for s in group.sources)
        click.echo(f"{len(group.tensors):4} x {group.template}  {list(group.shape)} {group.dtype}")
        settings = ", ".join(f"{name}={span_text(values)}" for name, values in group.parameters.items())
        click.echo(f"       {group.action} {models}{'  ' + settings if settings else ''}")
    click.echo()
    for shard in plan.shards[:6]:
        click.echo(f"  {shard.name}  {shard.size:,} bytes")
    if len(plan.shards) > 6:
        click.echo(f"  and {len(plan.shards) - 6} more shards")
    files = ", ".join(name for _, name in plan.files)
    click.echo(f"  config.json and from {plan.sources[plan.donor].reference}: {files or 'nothing else'}")
    if plan.left_out:
        click.echo(f"  {len(plan.left_out)} input tensors are not used (--json lists them)")
    click.echo(
        f"{plan.parameters:,} parameters; reads {plan.bytes_read / 1e9:.3f} GB (as often as a method needs), "
        f"writes {plan.bytes_written / 1e9:.3f} GB, needs about {api.memory(plan, options) / 1e6:.0f} MB of memory"
    )
    for text in plan.warnings:
        say(f"warning: {text}")
    for text in plan.notes:
        say(f"note: {text}")
