"""``mergekit moe``, also ``mergekit-moe``: several dense models become one mixture of experts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit.cli.boundary import as_events, event, plain, program, resumable, say, tell
from mergekit.cli.help import MergeCommand
from mergekit.cli.plan import plan_lines, report
from mergekit.cli.progress import downloads, progress
from mergekit.cli.run import announce, conclude, events_option
from mergekit.errors import UsageError
from mergekit.options import add_merge_options
from mergekit.version import __version__

if TYPE_CHECKING:
    from mergekit.moe.build import MoePlan

_QUANTISED = (
    "the layers that routers are calibrated on are streamed one at a time in their full precision, so there is "
    "nothing that quantising them would save; the output is made from the full precision files anyway"
)


@click.command(
    "moe", cls=MergeCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.argument("config_path", type=click.Path())
@click.argument("out_path", type=click.Path())
@click.option("--dry-run", is_flag=True, help="Print the plan and stop before anything is written.")
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Check the result: the identity law, reloading, a short text (default: for models below 2 GB).",
)
@click.option(
    "--i-understand-this-is-not-useful-without-training",
    "allow_all_same",
    is_flag=True,
    help="Accept experts that are all the same model.",
)
@click.option("--load-in-4bit", is_flag=True, help="Accepted; calibration streams full precision anyway.")
@click.option("--load-in-8bit", is_flag=True, help="Accepted; calibration streams full precision anyway.")
@events_option
@click.version_option(__version__, prog_name="mergekit")
@click.pass_context
@add_merge_options
@resumable()
def moe(
    ctx: click.Context,
    config_path: str,
    out_path: str,
    dry_run: bool,
    verify: bool | None,
    allow_all_same: bool,
    load_in_4bit: bool,
    load_in_8bit: bool,
    merge_options: Any,
) -> None:
    """Make a mixture of experts from the models of the recipe CONFIG_PATH (YAML), in the folder OUT_PATH.

    The same command continues a run that was interrupted.
    """
    from mergekit import api

    started = time.monotonic()
    options = merge_options.run_options()
    quiet = merge_options.quiet
    if not out_path:
        raise UsageError("OUT_PATH is empty; give a folder for the output")
    choices = api.MoeOptions(
        architecture=(ctx.obj or {}).get("architecture", "mixtral"),
        verify=verify,
        allow_all_same=allow_all_same,
        trust_remote_code=merge_options.trust_remote_code,
    )
    api.check_writable(Path(out_path), options)
    with downloads(shown=not quiet) as told:
        made = api.plan_moe(config_path, options, choices, fetch=not dry_run, told=told)
    notes = merge_options.given_without_effect()
    bits = [bits for bits, on in ((4, load_in_4bit), (8, load_in_8bit)) if on]
    notes += [f"--load-in-{n}bit changes nothing: {_QUANTISED}" for n in bits]
    announce(made.plan, options, dry_run=dry_run, quiet=quiet)
    report(made.plan, notes=() if quiet else [*notes, *made.plan.notes])
    if dry_run:
        return
    if merge_options.verbosity and not quiet and not as_events():
        say("\n".join(plan_lines(made.plan, options)))
    _execute(made, Path(out_path), options, choices, quiet)
    conclude(made.plan, out_path, time.monotonic() - started, report=options.report, quiet=quiet)


def _execute(made: MoePlan, out: Path, options: Any, choices: Any, quiet: bool) -> None:
    """Run the plan with progress on the screen; the routing report goes to stdout, remarks to stderr."""
    from mergekit import api

    with progress(made.nbytes, shown=not quiet) as meter:
        outcome = api.run_moe_plan(made, out, options, choices, meter.hooks())
    for text in outcome.remarks:
        tell("warning", text)
    if as_events():
        event("report", lines=outcome.lines)
    elif not quiet:
        for line in outcome.lines:
            click.echo(plain(line))


def main() -> None:
    """The program ``mergekit-moe``."""
    program(moe, "mergekit-moe")


def phi3_moe() -> None:
    """The script ``phi3_moe.py``: the same, writing the Phi-3 form unless the recipe says otherwise."""
    program(moe, "phi3_moe.py", obj={"architecture": "phi3moe"})
