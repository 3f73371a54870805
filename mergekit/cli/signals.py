"""Signals that end the program: at once, or as soon as what must not be cut in two is done."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["TerminatedError", "end", "leaving", "listen", "whole"]

_ECHO = 1.0
"""Seconds after a signal in which another one says nothing new: wrappers pass on what the terminal sends to all."""


class TerminatedError(BaseException):
    """The process was asked to end."""


class _Heard:
    """What has arrived. Python runs handlers in the main thread, so no lock is needed."""

    held = 0
    noted = 0
    raised_at = float("-inf")


leaving: list[Callable[[], None]] = []
"""What gives the terminal back, for as long as somebody has it."""


def listen() -> None:
    """From now on a signal is an exception in the main thread: KeyboardInterrupt or TerminatedError."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell has jobs in the background ignore it
        signal.signal(signal.SIGINT, _arrived)
    signal.signal(signal.SIGTERM, _arrived)  # what schedulers and containers send


def _arrived(number: int, frame: object) -> None:
    if _Heard.held:
        _Heard.noted = _Heard.noted or number
    elif time.monotonic() - _Heard.raised_at > _ECHO:
        _stop(number)


def _stop(number: int) -> None:
    _Heard.raised_at = time.monotonic()
    raise TerminatedError if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def whole() -> Iterator[None]:
    """What is within is done to its end; a signal that arrives meanwhile ends the program then."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal arrives there
        return
    _Heard.held += 1
    try:
        yield
    finally:
        _Heard.held -= 1
        if not _Heard.held and _Heard.noted:
            number, _Heard.noted = _Heard.noted, 0
            _stop(number)


def end() -> None:
    """How the program ends is settled: signals change it no more, and the terminal is given back.

    They are ignored for good: the interpreter takes our handlers away while it stops, and would die of a signal.
    A signal that arrives between two steps of ``with`` or ``finally`` skips the second, so somebody may have the
    terminal still.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _arrived:
            signal.signal(number, signal.SIG_IGN)
    while leaving:
        with suppress(OSError, ValueError):  # the terminal is gone
            leaving.pop()()
