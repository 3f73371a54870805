"""The border between the program and its user: faults become a few lines on stderr and an exit code."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn

from mergekit.cli import signals
from mergekit.errors import CONTROL, MergekitError, UsageError

if TYPE_CHECKING:
    import click

__all__ = ["EXIT_CODES", "as_events", "can_ask", "event", "plain", "program", "resumable", "run", "say", "tell"]


class _Listener:
    """Who listens: people, who read lines, or a program, which reads a JSON object for each event on stdout."""

    is_program = False
    lock = Lock()


def as_events(on: bool | None = None) -> bool:
    """Whether events are told instead of lines; ``on`` says so from now on."""
    if on is not None:
        _Listener.is_program = on
    return _Listener.is_program


def event(name: str, /, **facts: Any) -> None:
    """Tell a program something: one JSON object on a line of its own. Called by any thread."""
    with _Listener.lock:
        sys.stdout.write(json.dumps({"event": name, **facts}) + "\n")
        sys.stdout.flush()


def tell(kind: str, text: str) -> None:
    """Tell a ``warning`` or ``note``, to people or to a program."""
    if as_events():
        event(kind, text=plain(text))
    else:
        say(f"{kind}: {text}")


_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # as shells count
EXIT_CODES = {
    0: "done",
    MergekitError.exit_code: "an input, the hub or the machine is at fault, a check failed, or a pipe was closed",
    UsageError.exit_code: "the recipe, an option or a folder can't be used as given",
    _INTERRUPTED: "interrupted (Ctrl-C); the same command continues a merge",
    _TERMINATED: "asked to end (SIGTERM), likewise",
}
"""What the program ends with."""


def can_ask() -> bool:
    """Whether somebody is there to answer a question."""
    return sys.stdin is not None and sys.stdin.isatty()


def say(text: str = "") -> None:
    """Print lines for people on stderr; results go to stdout. Names from files can't reach the terminal's controls."""
    if as_events():
        event("message", text=plain(text))
        return
    _print(text)


def _print(text: str) -> None:
    # A live view draws around it, and could not go after half of that.
    with signals.whole() if signals.leaving else nullcontext():
        try:
            print(plain(text), file=sys.stderr, flush=True)
        except (OSError, ValueError):
            pass  # nobody listens; a remark that can't be made is no reason to fail


def _fail(text: str, code: int, kind: str) -> NoReturn:
    """End the program with an error."""
    _end(f"error: {text}", text, code, kind)


def _end(line: str, text: str, code: int, kind: str) -> NoReturn:
    """The last word: a line for people, an event with ``text`` for a program."""
    if as_events():
        try:
            event("error", text=plain(text), kind=kind, exit_code=code)
        except OSError:  # the program listens no more; somebody may read the other stream
            _hush()
            _print(line)
    else:
        _print(line)
    sys.exit(code)


def _hush() -> None:
    """What stdout holds yet, and could not write, goes nowhere: else the interpreter would fail by it at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain(text: str) -> str:
    """``text`` with control characters written out, and lines of more than 1,000 characters cut.

    >>> plain("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    lines = [CONTROL.sub(lambda match: repr(match[0])[1:-1], line) for line in text.split("\n")]
    return "\n".join(line if len(line) <= 1000 else line[:900] + " ... " + line[-90:] for line in lines)


def program(command: Callable[..., Any], name: str, **context: Any) -> None:
    """``run`` for a process of its own."""
    # A tenth of a short run would go to looking for cycles among what imports leave behind; merging makes none.
    gc.disable()
    _open_closed()
    signals.listen()
    run(command, name, **context)


def _open_closed() -> None:
    """Open standard streams that are closed, else the next file opened would be one: a shard could be stdout, say.

    Stdout is then a closed pipe, because results that nobody gets are a fault; of remarks they are none.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
            continue  # somebody else's file has the number
        except OSError:
            pass
        if name == "stdout":
            unread, descriptor = os.pipe()
            os.close(unread)
        else:
            descriptor = os.open(os.devnull, os.O_RDWR)
        os.dup2(descriptor, number)
        if descriptor != number:
            os.close(descriptor)
        setattr(
            sys, name, os.fdopen(number, "r" if name == "stdin" else "w", encoding="utf-8", errors="backslashreplace")
        )


def run(command: Callable[..., Any], name: str, **context: Any) -> None:
    """Run a click command as program ``name``, and end with one of ``EXIT_CODES``.

    ``context``: settings of click's context, such as ``obj``.
    """
    try:
        try:
            code = command.main(prog_name=name, standalone_mode=False, **context)  # type: ignore[attr-defined]
        finally:
            signals.end()
    except MergekitError as error:
        _fail(str(error), error.exit_code, type(error).__name__)
    except (KeyboardInterrupt, signals.TerminatedError) as error:
        signals.end()  # it may have come before the other call of it was through
        _interrupted(_TERMINATED if isinstance(error, signals.TerminatedError) else _INTERRUPTED, str(error))
    except BrokenPipeError:
        _hush()
        sys.exit(MergekitError.exit_code)
    except OSError as error:
        text = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        _fail(text, 1, type(error).__name__)
    except RecursionError:
        _fail("something in the recipe or in a file of a model is nested too deeply", 1, "RecursionError")
    except MemoryError:
        _fail("out of memory; close other programs, or use fewer threads (-j 1)", 1, "MemoryError")
    except Exception as error:
        sys.exit(_other(error))
    finally:
        as_events(False)
    if code:  # of a command that ended itself by ``ctx.exit``
        sys.exit(code)


@contextmanager
def resumable() -> Iterator[None]:
    """Around what the same command continues after an interrupt, and says so."""
    try:
        yield
    except (KeyboardInterrupt, signals.TerminatedError) as stop:
        stop.args = ("the same command continues where this one stopped",)
        raise


def _interrupted(code: int, advice: str = "") -> NoReturn:
    text = f"interrupted; {advice}" if advice else "interrupted"
    _end(text, text, code, "interrupted")


def _misused(error: click.ClickException) -> NoReturn:
    """End the program with what click found wrong about its arguments, said like our own faults."""
    text = " ".join(error.format_message().split()).removesuffix(".")
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # of new releases of click only
        error.show()
        sys.exit(error.exit_code)
    if context is not None and not as_events():
        usage = context.get_usage().replace("Usage", "usage", 1)
        text = f"{text[:1].lower()}{text[1:]}\n{usage}\n`{context.command_path} --help` says more"
    _fail(text, error.exit_code, UsageError.__name__)


def _other(error: Exception) -> int:
    """Messages for click's own faults, and for ours that we did not foresee."""
    import click

    if isinstance(error, click.exceptions.Abort):
        stop = error.__cause__  # click's word for an interrupt
        if stop is None and not as_events():  # at a prompt, on whose line the message would go on
            say()
        _interrupted(_INTERRUPTED, str(stop) if isinstance(stop, KeyboardInterrupt) else "")
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        _misused(error)
    if os.environ.get("MERGEKIT_DEBUG"):
        raise error
    _fail(
        f"this is a bug in mergekit: {type(error).__name__}: {error}\n"
        f"run again with MERGEKIT_DEBUG=1 for the details, and please report them",
        1,
        "bug",
    )
