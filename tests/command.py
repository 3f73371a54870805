"""Run the program for tests: inside this process (fast), through the same border that users meet."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mergekit.cli import boundary

__all__ = ["Result", "mergekit", "mergekit_yaml"]


@dataclass(frozen=True)
class Result:
    """What a command left behind: exit code, what it printed, and whatever escaped it (never a traceback)."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of stderr."""
        return self.err.splitlines()


def _run(command: Any, program: str, args: tuple[str | Path, ...]) -> Result:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", [program, *map(str, args)]), redirect_stdout(out), redirect_stderr(err):
        try:
            boundary.run(command)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return Result(code, out.getvalue(), err.getvalue())


def mergekit(*args: str | Path) -> Result:
    """``mergekit ARGS``."""
    from mergekit.cli.main import mergekit as command

    return _run(command, "mergekit", args)


def mergekit_yaml(*args: str | Path) -> Result:
    """``mergekit-yaml ARGS``."""
    from mergekit.cli.merge import merge as command

    return _run(command, "mergekit-yaml", args)


Program = Callable[..., Result]
