"""What every command that writes a model says before and after: to people, or as events to programs."""

from __future__ import annotations

import json
import os
import shlex
from typing import TYPE_CHECKING, Any

import click

from mergekit.cli.boundary import as_events, event, say
from mergekit.cli.plan import plan_lines
from mergekit.cli.progress import is_terminal
from mergekit.cli.show import size
from mergekit.errors import some_of

if TYPE_CHECKING:
    from mergekit.planning.plan import Plan

__all__ = ["announce", "conclude", "events_option"]

events_option = click.option(
    "--json",
    is_flag=True,
    is_eager=True,  # so that faults of other options are events, too
    expose_value=False,
    callback=lambda context, option, on: as_events(on),
    help="Tell programs what happens: a JSON object a line on stdout.",
)


_LARGE = 1_000_000_000
"""Bytes to read and write from which a run takes long enough for a line at its start, where no view shows it."""


def announce(plan: Plan, options: Any, *, dry_run: bool, quiet: bool) -> None:
    """Tell what is about to be done: to programs; to people, who see the plan of a dry run and what takes long."""
    from mergekit import api

    models = [source.reference for source in plan.sources if not source.prepared]
    if as_events():
        event(
            "plan",
            method=plan.method,
            models=models,
            parameters=plan.parameters,
            bytes_read=plan.bytes_read,
            bytes_written=plan.bytes_written,
            memory=api.memory(plan, options),
        )
    elif dry_run:
        click.echo("\n".join(plan_lines(plan, options)))
    elif plan.bytes_read + plan.bytes_written >= _LARGE and not quiet and not is_terminal():
        say(
            f"merging {some_of(models)} by {plan.method}: "
            f"reads {size(plan.bytes_read)}, writes {size(plan.bytes_written)}"
        )


def conclude(plan: Plan, out: str, seconds: float, *, report: bool, quiet: bool) -> None:
    """The last word: where the model is and its ``report``, if it has one; how long it took, how to load it."""
    from mergekit.output.report import REPORT

    page = os.path.join(out, REPORT)
    pages = {"report": page} if report and os.path.isfile(page) else {}  # none in a folder that was complete already
    if as_events():
        event("done", out=out, seconds=round(seconds, 3), parameters=plan.parameters, bytes=plan.bytes_written, **pages)
    elif not quiet:
        say(f"wrote {out}: {plan.parameters:,} parameters, {size(plan.bytes_written)}, in {seconds:.1f} s")
        for path in pages.values():
            say(f"wrote {path}, to open in a browser")
        if plan.config:
            from mergekit.families.config import loading

            call = loading(json.loads(plan.config), json.dumps(out, ensure_ascii=False))
            say(f"load it: {call}   check it: mergekit verify {shlex.quote(out)}")
