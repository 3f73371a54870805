"""How far a run is, on stderr: a live view in a terminal, now and then a line elsewhere, events for programs."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mergekit.cli.boundary import as_events, event, say
from mergekit.cli.show import duration, size

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Meter", "compiling", "progress"]

_WINDOW = 10.0
"""Speed is that of so many last seconds."""
_FIRST_LINE, _SLOW_LINE = 10.0, 30.0
"""Without a terminal: nothing in so many first seconds; then a line for each tenth, but at least each so often."""
_EVENTS = 0.25
"""Seconds between two events of progress."""


def compiling(forms: list[str]) -> None:
    """Say that kernels are about to be compiled."""
    say(f"compiling kernels for this machine ({', '.join(forms)}); this happens once")


class Meter:
    """Counts bytes and shows nothing. Called with each number of bytes that is done, by any thread."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what = total, what
        self.done, self.tensor = 0, ""
        self.started = 0.0
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, int]] = deque(maxlen=4096)

    def __call__(self, nbytes: int) -> None:
        """``nbytes`` more are done."""
        with self._lock:
            self.done += nbytes
            self.started = self.started or time.monotonic()  # what comes before the first bytes does not count
            self._samples.append((time.monotonic(), self.done))
            self.show()

    def opened(self, tensor: str) -> None:
        """``tensor`` is begun."""
        self.tensor = tensor

    def show(self) -> None:
        """Bring the count before somebody's eyes, if it is time for that."""

    @property
    def share(self) -> float:
        """The part that is done."""
        return min(self.done / self.total, 1.0) if self.total else 1.0

    def speed(self) -> float:
        """Bytes in a second, lately; 0 if that can't be told yet. What an earlier run had done does not count."""
        now = time.monotonic()
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW:
            self._samples.popleft()
        if not self._samples or now <= self._samples[0][0]:
            return 0.0
        since, before = self._samples[0]
        return (self.done - before) / (now - since)

    def figures(self) -> str:
        """``920 MB of 2.2 GB, 310 MB/s, 4 s left``."""
        speed = self.speed()
        left = [f"{size(speed)}/s", f"{duration((self.total - self.done) / speed)} left"] if speed else []
        return ", ".join([f"{size(self.done)} of {size(self.total)}", *left])


class _Lines(Meter):
    """A line now and then."""

    _last, _share = 0.0, 0.0

    def show(self) -> None:
        now = time.monotonic()
        waited = now - (self._last or self.started)
        if waited > _FIRST_LINE and (waited > _SLOW_LINE or self.share >= self._share + 0.1):
            self._last, self._share = now, self.share
            say(f"{self.what}: {self.share:.0%}, {self.figures()}")


class _Events(Meter):
    """An event now and then."""

    _last = 0.0

    def show(self) -> None:
        now = time.monotonic()
        if now - self._last >= _EVENTS or self.done >= self.total:
            self._last = now
            event("progress", bytes=self.done, total=self.total, tensor=self.tensor)


class _View(Meter):
    """Three lines: a bar, the figures, the tensor at hand. Lines that are too long for the terminal are cut."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column()
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        bar.add_row(self.what, ProgressBar(total=max(self.total, 1), completed=self.done), f"{self.share:4.0%}")
        yield bar
        for text in (self.figures(), self.tensor):
            yield Text(f"  {text}", no_wrap=True, overflow="ellipsis", style="dim" if text == self.tensor else "")


@contextmanager
def progress(total: int, *, shown: bool, what: str = "merging") -> Iterator[Meter]:
    """A meter of ``total`` bytes for the time of a run: call it with each number of bytes that is done."""
    if as_events():
        yield _Events(total, what)
    elif not shown or sys.stderr is None:
        yield Meter(total, what)
    elif not _is_terminal():
        yield _Lines(total, what)
    else:
        from rich.console import Console
        from rich.live import Live

        view = _View(total, what)
        # What is printed meanwhile appears above; the view goes when the run ends, however it ends.
        with Live(view, console=Console(stderr=True), refresh_per_second=8, transient=True, redirect_stdout=False):
            yield view


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
