"""How far a run is, on stderr: a live view in a terminal, now and then a line elsewhere, events for programs."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from mergekit.cli.boundary import as_events, event, plain, say
from mergekit.cli.show import duration, size

if TYPE_CHECKING:
    from mergekit.api import Hooks

__all__ = ["Meter", "downloads", "is_terminal", "progress"]

_WINDOW = 10.0
"""Speed is that of so many last seconds."""
_FIRST_LINE, _SLOW_LINE = 10.0, 30.0
"""Without a terminal: nothing in so many first seconds; then a line for each tenth, but at least each so often."""
_EVENTS = 0.25
"""Seconds between two events of progress."""


class Meter:
    """Counts bytes and shows nothing. Called with each number of bytes that is done, by any thread."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what = total, what
        self.done, self.at_hand = 0, ""
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
        self.at_hand = tensor

    def stage(self, text: str) -> None:
        """Something is done besides the tensors, which takes long."""
        with self._lock:
            self._samples.clear()  # nor does this count
            self.tell(text)

    def compiling(self, forms: list[str]) -> None:
        """Kernels are about to be compiled."""
        self.stage(self.about_kernels(forms))

    @staticmethod
    def about_kernels(forms: list[str]) -> str:
        """What there is to say of compiling."""
        return f"compiling kernels for this machine ({', '.join(forms)}); this happens once"

    def hooks(self) -> Hooks:
        """What tells this meter of a run."""
        from mergekit.api import Hooks

        return Hooks(on_compile=self.compiling, advance=self, opened=self.opened, stage=self.stage)

    def show(self) -> None:
        """Bring the count before somebody's eyes, if it is time for that."""

    def tell(self, text: str) -> None:
        """Bring a stage before somebody's eyes."""

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
        is_time = waited > _FIRST_LINE and (waited > _SLOW_LINE or self.share >= self._share + 0.1)
        if is_time and self.share < 1:
            self._last, self._share = now, self.share
            say(f"{self.what}: {self.share:.0%}, {self.figures()}")

    def tell(self, text: str) -> None:
        say(text)


class _Events(Meter):
    """An event now and then."""

    _last = 0.0

    def show(self) -> None:
        now = time.monotonic()
        if now - self._last >= _EVENTS or self.done >= self.total:
            self._last = now
            event("progress", bytes=self.done, total=self.total, tensor=self.at_hand)

    def tell(self, text: str) -> None:
        event("message", text=plain(text))


@contextmanager
def progress(total: int, *, shown: bool, what: str = "merging") -> Iterator[Meter]:
    """A meter of ``total`` bytes for the time of a run: call it with each number of bytes that is done."""
    if as_events():
        yield _Events(total, what)
    elif not shown or sys.stderr is None:
        yield Meter(total, what)
    elif not is_terminal():
        yield _Lines(total, what)
    else:
        from mergekit.cli.view import View

        view = View(total, what)
        with view.shown():
            yield view


@contextmanager
def downloads(*, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Shows what is downloaded, one model after another: call it with model, bytes that are here, bytes in all."""
    with ExitStack() as screen:
        meter: Meter | None = None

        def told(model: str, done: int, total: int) -> None:
            nonlocal meter
            if as_events():
                event("download", model=plain(model), bytes=done, total=total)
                return
            if meter is None or (meter.at_hand, meter.total) != (model, total):
                screen.close()
                meter = screen.enter_context(progress(total, shown=shown, what="downloading"))
                meter.opened(model)
            meter(done - meter.done)

        yield told


def is_terminal() -> bool:
    """Whether stderr is a terminal that can move its cursor."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
