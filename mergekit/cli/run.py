"""What every command that writes a model says before and after: to people, or as events to programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from mergekit.cli.boundary import as_events, event, say
from mergekit.cli.plan import plan_lines
from mergekit.cli.show import size

if TYPE_CHECKING:
    from mergekit.planning import Plan

__all__ = ["announce", "conclude", "events_option"]

events_option = click.option(
    "--json", "events", is_flag=True, help="Tell programs what happens: a JSON object a line on stdout."
)


def announce(plan: Plan, options: Any, *, dry_run: bool) -> None:
    """Tell what is about to be done: to programs; to people, who see the plan of a dry run only."""
    from mergekit import api

    if as_events():
        event(
            "plan",
            method=plan.method,
            models=[source.reference for source in plan.sources if not source.prepared],
            parameters=plan.parameters,
            bytes_read=plan.bytes_read,
            bytes_written=plan.bytes_written,
            memory=api.memory(plan, options),
        )
    elif dry_run:
        click.echo("\n".join(plan_lines(plan, options)))


def conclude(plan: Plan, out: str, seconds: float, *, quiet: bool) -> None:
    """The last word: where the model is, how long it took, how to load it."""
    if as_events():
        event("done", out=out, seconds=round(seconds, 3), parameters=plan.parameters, bytes=plan.bytes_written)
    elif not quiet:
        say(f"wrote {out}: {plan.parameters:,} parameters, {size(plan.bytes_written)}, in {seconds:.1f} s")
        if plan.config:
            say(f"load it: {loading(json.loads(plan.config), out)}   check it: mergekit verify {out}")


def loading(config: Mapping[str, Any], out: str) -> str:
    """The call of transformers that loads the model in the folder ``out``."""
    from mergekit.families.config import auto_class

    code = ", trust_remote_code=True" if "auto_map" in config else ""
    return f'{auto_class(config)}.from_pretrained("{out}"{code})'
