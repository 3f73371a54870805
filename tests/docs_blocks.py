"""Run what the pages show: files that they have one write, and console blocks, in order, page by page.

    <!-- file: recipe.yml -->      the block below is written to that file first
    <!-- not run: reason -->       the block below can't be run here

What a ```console block shows must be what its commands print. Figures may differ by a twentieth (processors round
differently), times by anything, and so may lines in quotes, which a model wrote; runs of spaces count as one; a line of
``...`` stands for any lines.
``MERGEKIT_UPDATE_DOCS=1`` writes what was printed into the page instead.
"""

from __future__ import annotations

import io
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from mergekit.cli import boundary

__all__ = ["Block", "blocks", "run_page", "same"]

_FENCE = re.compile(
    r"(?:^<!-- (?P<word>file|not run): (?P<rest>[^\n]*?) -->\n+)?^```(?P<kind>\w+)[^\n]*\n(?P<text>.*?)^```$",
    re.M | re.S,
)
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

    def commands(self) -> Iterator[tuple[str, str]]:
        """Each command of a console block, with what is shown below it."""
        parts = re.split(r"^\$ ", self.text, flags=re.M)
        for part in parts[1:]:
            line, _, shown = part.partition("\n")
            while line.endswith("\\"):
                more, _, shown = shown.partition("\n")
                line = line[:-1] + more.strip()
            yield line, shown


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    for match in _FENCE.finditer(page):
        file = match["rest"] if match["word"] == "file" else None
        reason = match["rest"] if match["word"] == "not run" else None
        found.append(Block(match["kind"], match["text"], match.start("text"), match.end("text"), file, reason))
    return found


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
                printed = run_command(line, folder)
                told.append(f"$ {line}\n{printed}")
                if not same(shown, printed):
                    faults.append(f"{path.name}: $ {line}\n--- shown\n{shown}--- printed\n{printed}")
            edits.append((block, "".join(told)))
    if faults and os.environ.get("MERGEKIT_UPDATE_DOCS"):
        for block, text in reversed(edits):
            page = page[: block.start] + text + page[block.end :]
        path.write_text(page)
    return faults, reasons


def run_command(line: str, folder: Path) -> str:
    """What a command prints, stdout and stderr as a terminal mixes them; ``mergekit`` runs in this process."""
    words = shlex.split(line, comments=True)
    if words[0] != "mergekit" or any(mark in words for mark in ("|", ">", "&&", ";")):
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.stdout
    from mergekit.cli.main import mergekit

    told = io.StringIO()
    quick = patch.object(os, "fsync", lambda descriptor: None)
    with patch.object(sys, "argv", words), quick, redirect_stdout(told), redirect_stderr(told), suppress(SystemExit):
        boundary.run(mergekit, "mergekit")
    return told.getvalue()


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
