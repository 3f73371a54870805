"""Run what the pages show: files that they have one write, and console blocks, in order, page by page.

    File `recipe.yml`:             the block below is written to that file first
    <!-- not run: reason -->       the block below can't be run here

What a ```console block shows must be what its commands print, and they must succeed, but for those that show an error;
a block that shows no output only says that they do. Figures may differ by a twentieth (processors round differently),
times by anything, and so may lines in quotes, which a model wrote; runs of spaces count as one; a line of ``...`` is
any lines; how far a slow machine is in between is left out.
``MERGEKIT_UPDATE_DOCS=1`` writes what was printed into the page instead.
"""

from __future__ import annotations

import io
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from mergekit.cli import boundary
from mergekit.methods import registry

__all__ = ["Block", "blocks", "indented_commands", "run_command", "run_page", "same"]

_FENCE = re.compile(
    r"(?:^(?:File `(?P<file>[^`\n]+)`:|<!-- not run: (?P<reason>[^\n]*?) -->)\n+)?"
    r"^```(?P<kind>\w+)[^\n]*\n(?P<text>.*?)^```$",
    re.M | re.S,
)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n)+")
_PROGRAMS = (".venv/bin/mergekit", "mergekit", "python", "make", "git", "pip", "eval")
_MEANWHILE = re.compile(r"^merging: .* left\n", re.M)
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_TIME = re.compile(r"\b\d[\d.]* (s|min|h|seconds|minutes|hours)\b|\b[\d.]+ [kMG]?B/s")
_DIGEST = re.compile(r"\b[0-9a-f]{12,64}\b")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its kind, its text, the file that it is, and why it is not run."""

    kind: str
    text: str
    start: int
    end: int
    file: str | None
    not_run: str | None

    @property
    def shows_output(self) -> bool:
        """Whether anything stands below its commands."""
        return any(shown.strip() for _, shown in self.commands())

    def commands(self) -> Iterator[tuple[str, str]]:
        """Each command of a console block, with what is shown below it."""
        parts = re.split(r"^\$ ", self.text, flags=re.M)
        for part in parts[1:]:
            line, _, shown = part.partition("\n")
            while line.endswith("\\"):
                more, _, shown = shown.partition("\n")
                line = line[:-1] + more.strip()
            yield line.partition("  #")[0].rstrip(), shown


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    for match in _FENCE.finditer(page):
        place = (match.start("text"), match.end("text"))
        found.append(Block(match["kind"], match["text"], *place, match["file"], match["reason"]))
    return found


def indented_commands(page: str) -> list[str]:
    """The commands of a page that stand in indented blocks, without their comments."""
    lines = [line for block in _INDENTED.findall(_FENCE.sub("", page)) for line in block.splitlines()]
    commands = [line.partition("  #")[0].strip() for line in lines]
    return [command for command in commands if command.partition(" ")[0] in _PROGRAMS]


def run_page(path: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Run the blocks of a page in ``folder``; what differs from what it shows, and the reasons for blocks not run."""
    page = path.read_text()
    faults, reasons, edits = [], [], []
    for block in blocks(page):
        if block.not_run is not None:
            reasons.append(block.not_run)
        elif block.file is not None:
            (folder / block.file).write_text(block.text)
        elif block.kind == "console":
            told = []
            for line, shown in block.commands():
                code, printed = run_command(line, folder)
                told.append(f"$ {line}\n{printed}")
                fails = any(line.startswith(("error: ", '{"event": "error"')) for line in shown.splitlines())
                if bool(code) != fails:
                    faults.append(f"{path.name}: $ {line}\nends with {code}\n{printed}")
                elif block.shows_output and not same(shown, printed):
                    faults.append(f"{path.name}: $ {line}\n--- shown\n{shown}--- printed\n{printed}")
            if block.shows_output:
                edits.append((block, "".join(told)))
    if faults and os.environ.get("MERGEKIT_UPDATE_DOCS"):
        for block, text in reversed(edits):
            page = page[: block.start] + text + page[block.end :]
        path.write_text(page)
    return faults, reasons


def run_command(line: str, folder: Path) -> tuple[int, str]:
    """A command's exit code and what it prints, stdout and stderr as a terminal mixes them.

    ``mergekit`` and Python files run in this process, which has imported what takes long, unless they limit its memory.
    """
    words = shlex.split(line.removeprefix(".venv/bin/"), comments=True)
    is_plain = not any(mark in words for mark in ("|", ">", "&&", ";", "--max-memory"))
    if is_plain and words[0] == "mergekit":
        from mergekit.cli.main import mergekit

        return _run_here(lambda: boundary.run(mergekit, "mergekit"), words)
    if is_plain and words[0] == "python" and words[1].endswith(".py"):
        return _run_here(lambda: runpy.run_path(str(folder / words[1]), run_name="__main__"), words[1:])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def _run_here(function: Callable[[], object], words: list[str]) -> tuple[int, str]:
    told, code = io.StringIO(), 0
    quick = patch.object(os, "fsync", lambda descriptor: None)
    own_methods = (
        patch.dict(registry.REGISTRY),
        patch.dict(registry._FILES),
    )  # --method-file ends with it
    with own_methods[0], own_methods[1], quick, patch.object(sys, "argv", words):
        try:
            with redirect_stdout(told), redirect_stderr(told):
                function()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return code, _MEANWHILE.sub("", told.getvalue())


def same(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, by the rule above."""
    wanted, found = _lines(shown), _lines(printed)
    if "..." not in wanted:
        return len(wanted) == len(found) and all(map(_same_line, wanted, found))
    at = wanted.index("...")
    tail = wanted[at + 1 :]
    head = _lines(printed)[:at]
    rest = found[at:]
    if not (len(head) == at and all(map(_same_line, wanted[:at], head))):
        return False
    return not tail or any(same("\n".join(tail), "\n".join(rest[i:])) for i in range(len(rest) + 1))


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def _same_line(shown: str, printed: str) -> bool:
    if shown.startswith("'") and printed.startswith("'"):
        return True
    a, b = (_DIGEST.sub("DIGEST", _TIME.sub("TIME", line)) for line in (shown, printed))
    if _NUMBER.sub("N", a) != _NUMBER.sub("N", b):
        return False
    pairs = zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=True)
    return all(math.isclose(_value(x), _value(y), rel_tol=0.05, abs_tol=0.011) for x, y in pairs)


def _value(text: str) -> float:
    return float(text.replace(",", ""))
