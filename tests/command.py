"""Run the program for tests: inside this process (fast), through the same border that users meet."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mergekit.cli import boundary
from mergekit.errors import MergekitError

__all__ = ["Result", "assert_refused", "mergekit", "mergekit_yaml", "refusal", "warm_up"]


@dataclass(frozen=True)
class Result:
    """What a command left behind: its exit code and what it printed."""

    code: int
    out: str
    err: str

    def lines(self, *kinds: str) -> list[str]:
        """The lines of stderr that begin with one of ``kinds`` (warning, note, error); all lines if none is given."""
        starts = tuple(f"{kind}: " for kind in kinds)
        return [line for line in self.err.splitlines() if not kinds or line.startswith(starts)]


def _run(command: Any, program: str, args: tuple[str | Path, ...]) -> Result:
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = patch.object(sys, "argv", [program, *map(str, args)])
    no_wait = patch.object(os, "fsync", lambda descriptor: None)  # hundreds of tiny merges would wait for the disk
    with argv, no_wait, redirect_stdout(out), redirect_stderr(err):
        try:
            boundary.run(command, program)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Result(code, out.getvalue(), err.getvalue())


@cache
def warm_up() -> None:
    """Compile the kernels, once in a test run, where they are not: commands are then as fast as users know them."""
    from mergekit.kernels import warmup

    warmup.warm_up()


def mergekit(*args: str | Path) -> Result:
    """``mergekit ARGS``."""
    from mergekit.cli.main import mergekit as command

    return _run(command, "mergekit", args)


def mergekit_yaml(*args: str | Path) -> Result:
    """``mergekit-yaml ARGS``."""
    from mergekit.cli.merge import merge as command

    return _run(command, "mergekit-yaml", args)


def assert_refused(result: Result, code: int, *phrases: str) -> None:
    """The command ended with ``code`` and a short message that holds ``phrases``, soon, and nothing on stdout."""
    assert result.code == code, result
    shown = result.err.splitlines()
    told = [line for line in shown if not line.startswith(("warning: ", "note: "))]
    assert told, result
    assert told[0].startswith("error: "), result
    assert len(told) <= 5, result.err
    assert max(map(len, shown)) <= 1000, result.err
    assert "Traceback" not in result.err
    assert "bug in mergekit" not in result.err, result.err
    for phrase in phrases:
        assert phrase in result.err, f"{phrase!r} is not in: {result.err}"
    assert result.out == ""


def refusal(function: Callable[..., object], *args: object) -> MergekitError | None:
    """The fault with which ``function`` refuses ``args``; None if it accepts them. Other exceptions are not caught."""
    try:
        function(*args)
    except MergekitError as error:
        return error
    return None
