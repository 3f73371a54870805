"""A command with a live view that is interrupted at one step after the other, each time in a terminal of its own.

``python interrupts.py STRIDE SECOND`` takes every STRIDE-th instruction of what shows the view and takes it away, sends
a second signal SECOND instructions later if that is not 0, and prints a JSON object a line: step, exit code, output.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click
import rich.live

from mergekit.cli import boundary, progress, view

_FOLDER = str(Path(view.__file__).parent)
_FILES = (_FOLDER, contextlib.__file__, rich.live.__file__)
_NEVER = 1 << 60


def command(at: tuple[int, ...]) -> click.Command:
    """A command that sends itself SIGINT ``at`` these steps, and says how many it has if none is among them."""
    steps = 0

    def count(frame: FrameType, kind: str, argument: object) -> Any:
        nonlocal steps
        if not frame.f_code.co_filename.startswith(_FILES):
            return None
        frame.f_trace_opcodes = True
        if steps in at:
            os.kill(os.getpid(), signal.SIGINT)
        steps += 1
        return count

    @click.command()
    def work() -> None:
        sys.settrace(count)
        try:
            with progress.progress(100, shown=True, what="reading") as meter:
                meter(50)
                boundary.say("half of it")
        finally:
            sys.settrace(None)
        boundary.say(f"steps: {steps}")

    return work


def run(*at: int) -> tuple[int, str]:
    """Exit code and output of the command in a terminal."""
    pid, terminal = pty.fork()
    if not pid:
        code = 70
        try:
            boundary.program(command(at), "interrupts", args=[])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def main(stride: int, second: int) -> None:
    """Print what became of it for each step."""
    steps = int(run(_NEVER)[1].rsplit("steps: ")[1])
    for step in range(0, steps, stride):
        code, shown = run(step, step + second) if second else run(step)
        print(json.dumps({"step": step, "code": code, "shown": shown}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
