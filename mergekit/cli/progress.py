"""Progress on stderr: bytes per second and time left, when a terminal is there to show them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mergekit.cli.boundary import say

__all__ = ["compiling", "progress"]


def compiling(forms: list[str]) -> None:
    """Say that kernels are about to be compiled."""
    say(f"compiling kernels for this machine ({', '.join(forms)}); this happens once")


@contextmanager
def progress(total: int, *, shown: bool, what: str = "merging") -> Iterator[Callable[[int], None]]:
    """A function to call with each number of bytes that is done, while the bar is on the screen."""
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
