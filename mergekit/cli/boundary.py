"""The border between the program and its user: faults become a few lines on stderr and an exit code."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

from mergekit.errors import MergekitError

__all__ = ["plain", "program", "run", "say"]

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def say(text: str = "") -> None:
    """Print lines for people on stderr; results go to stdout. Names from files can't reach the terminal's controls."""
    try:
        print(plain(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass  # nobody listens; a remark that can't be made is no reason to fail


def plain(text: str) -> str:
    """``text`` with control characters written out, and lines of more than 1,000 characters cut.

    >>> plain("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    lines = _CONTROL.sub(lambda match: repr(match[0])[1:-1], text).split("\n")
    return "\n".join(line if len(line) <= 1000 else line[:900] + " ... " + line[-90:] for line in lines)


def program(command: Callable[..., Any], name: str, **context: Any) -> None:
    """``run`` for a process of its own."""
    # A tenth of a short run would go to looking for cycles among what imports leave behind; merging makes none.
    gc.disable()
    signal.signal(signal.SIGTERM, _terminate)
    run(command, name, **context)


def run(command: Callable[..., Any], name: str, **context: Any) -> None:
    """Run a click command as program ``name``. 0: done; 1: input or machine; 2: recipe or usage; 130: interrupted.

    ``context``: settings of click's context, such as ``obj``.
    """
    try:
        code = command.main(prog_name=name, standalone_mode=False, **context)  # type: ignore[attr-defined]
    except MergekitError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, _TerminatedError) as error:
        say("interrupted; the same command continues where this one stopped")
        sys.exit(143 if isinstance(error, _TerminatedError) else 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        say(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        sys.exit(1)
    except RecursionError:
        say("error: something in the recipe or in a file of a model is nested too deeply")
        sys.exit(1)
    except MemoryError:
        say("error: out of memory; close other programs, or use fewer threads (-j 1)")
        sys.exit(1)
    except Exception as error:
        sys.exit(_other(error))
    if code:  # of a command that ended itself by ``ctx.exit``
        sys.exit(code)


class _TerminatedError(BaseException):
    """The process was asked to end."""


def _terminate(number: int, frame: object) -> None:
    """What schedulers and containers send: stop as for an interrupt, keeping what is finished."""
    raise _TerminatedError


def _other(error: Exception) -> int:
    """Messages for click's own faults, and for ours that we did not foresee."""
    import click

    if isinstance(error, click.exceptions.Abort):
        say("interrupted; the same command continues where this one stopped")
        return 130
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if os.environ.get("MERGEKIT_DEBUG"):
        raise error
    say(f"error: this is a bug in mergekit: {type(error).__name__}: {error}")
    say("run again with MERGEKIT_DEBUG=1 for the details, and please report them")
    return 1
