"""``mergekit warmup``: compile the kernels ahead of the first merge."""

from __future__ import annotations

import time

import click

from mergekit.cli.boundary import say


@click.command("warmup", context_settings={"help_option_names": ["-h", "--help"]})
def warmup() -> None:
    """Compile the CPU kernels for this machine, so that the first merge need not."""
    from mergekit.kernels.warmup import cold_forms, warm_up

    started = time.monotonic()
    cold = cold_forms()
    warm_up()
    done = f"compiled {', '.join(cold)}" if cold else "nothing to compile"
    say(f"{done} ({time.monotonic() - started:.1f} s)")
