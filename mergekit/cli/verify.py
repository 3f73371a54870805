"""``mergekit verify`` and ``mergekit reproduce``: check a model, and that its recipe gives it again."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit.cli.boundary import plain, say
from mergekit.cli.plan import report
from mergekit.cli.progress import progress

if TYPE_CHECKING:
    from mergekit.planning.plan import Plan

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.command("verify", context_settings=_SETTINGS)
@click.argument("folder", type=click.Path())
@click.option("--load", is_flag=True, help="Load it with transformers and let it continue a text, too.")
@click.option("--sha256", is_flag=True, help="Print the SHA-256 of each file, too.")
@click.option("--trust-remote-code", is_flag=True, help="With --load: run the code that lies in the folder.")
@click.option("-j", "--num-threads", type=click.IntRange(1), help="Threads (default: one for each processor).")
@click.option("--quiet", is_flag=True, help="Print faults only.")
@click.pass_context
def verify(
    ctx: click.Context,
    folder: str,
    load: bool,
    sha256: bool,
    trust_remote_code: bool,
    num_threads: int | None,
    quiet: bool,
) -> None:
    """Check the model in FOLDER: files, values, config and tokenizer, and what merge_manifest.json says.

    Ends with 0 if the model is sound, with 1 if it is not, with 1 or 2 and an error if it can't be read at all.
    """
    from mergekit.api.verify import verify_model
    from mergekit.checkpoint import open_checkpoint

    total = open_checkpoint(Path(folder)).nbytes()
    with progress(total, shown=not quiet) as advance:
        result = verify_model(
            Path(folder),
            load=load,
            sha256=sha256,
            trust_remote_code=trust_remote_code,
            threads=num_threads,
            advance=advance,
        )
    _conclude(ctx, result, quiet, f"{folder} is sound")


@click.command("reproduce", context_settings=_SETTINGS)
@click.argument("folder", type=click.Path())
@click.option("-j", "--num-threads", type=click.IntRange(1), help="Threads (default: one for each processor).")
@click.option("--transformers-cache", type=Path, metavar="PATH", help="Cache folder for hub downloads.")
@click.option("--method-file", type=Path, multiple=True, help="Python file that defines merge methods; it is run.")
@click.option("--trust-remote-code", is_flag=True, help="Run a tokenizer's own code (only mixtures use one).")
@click.option("--quiet", is_flag=True, help="Print faults only.")
@click.pass_context
def reproduce(
    ctx: click.Context,
    folder: str,
    num_threads: int | None,
    transformers_cache: Path | None,
    method_file: tuple[Path, ...],
    trust_remote_code: bool,
    quiet: bool,
) -> None:
    """Merge again what the model in FOLDER was made from, and compare it with merge_manifest.json.

    The recipe is the one in FOLDER; its models are looked for from the current folder, and a method of your own comes
    with --method-file as it did then. Nothing is written. Ends with 0 if every tensor comes out the same, with 1 if
    not.
    """
    from mergekit.api import RunOptions
    from mergekit.api.reproduce import reproduce_model

    options = RunOptions(threads=num_threads, cache_dir=transformers_cache, method_files=method_file, quiet=quiet)
    with ExitStack() as screen:
        bars: list[Any] = []

        def on_plan(plan: Plan) -> None:
            report(plan, notes=())
            total = sum(output.nbytes for output in plan.outputs)
            bars.append(screen.enter_context(progress(total, shown=not quiet)))

        result = reproduce_model(
            Path(folder),
            options,
            trust_remote_code=trust_remote_code,
            stage=(lambda text: None) if quiet else say,
            on_plan=on_plan,
            advance=lambda nbytes: bars[0](nbytes),
        )
    _conclude(ctx, result, quiet, f"the recipe of {folder} gives what its manifest says (verify compares the files)")


def _conclude(ctx: click.Context, result: Any, quiet: bool, verdict: str) -> None:
    """Say what was found and end the program."""
    if not quiet:
        for line in result.lines:
            click.echo(plain(line))
    for fault in result.faults:
        click.echo(plain(f"fault: {fault}"))
    if result.faults:
        ctx.exit(1)
    if not quiet:
        click.echo(plain(verdict))
