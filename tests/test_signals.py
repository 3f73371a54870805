"""Interrupts at any moment, and standard streams that are closed: the exit code is the documented one, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import command
from models import family

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, "-m", "mergekit"]
INHERITED = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
ENVIRONMENT = {**INHERITED, "TERM": "xterm", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    models = [{"model": folder.name, "parameters": {"weight": 1}} for folder in family(tmp_path, 2)]
    Path("r.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    command.warm_up()
    return Path("r.yml")


# Signals


@pytest.mark.parametrize(("stride", "second"), [(97, 0), (149, 7)])
def test_an_interrupt_at_any_step_of_the_live_view_gives_the_terminal_back(stride: int, second: int) -> None:
    """A wrapper passes on what the terminal sends to all, so two signals may come at almost the same time."""
    script = [sys.executable, str(ROOT / "tests/interrupts.py"), str(stride), str(second)]
    done = subprocess.run(script, env={**ENVIRONMENT, "COLUMNS": "80"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 15
    for entry in found:
        shown = entry["shown"]
        assert entry["code"] == 130, entry
        assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), entry
        assert shown.endswith("interrupted\r\n"), entry
        assert "reading" not in shown.rsplit("\x1b[?25h")[-1], entry
        assert "Traceback" not in shown, entry


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_after_the_last_word_change_nothing(recipe: Path, number: signal.Signals, code: int) -> None:
    script = (
        "import atexit, sys, time\natexit.register(time.sleep, 0.2)\nsys.argv[0] = 'mergekit'\n"
        "from mergekit.output.staging import Staging\nwrite = Staging.write\n"
        "Staging.write = lambda *a: (print('writing', file=sys.stderr), time.sleep(0.4), write(*a))[-1]\n"
        "from mergekit.cli.main import main; main()"
    )
    arguments = [sys.executable, "-c", script, "merge", "r.yml", "out"]
    shown, sent = [], 0
    with subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            shown.append(line)
            if line == "writing\n" and not sent:
                process.send_signal(number)
                sent = 1
            if line.startswith("interrupted"):
                break
        while process.poll() is None:
            process.send_signal(number)
            sent += 1
            time.sleep(0.002)
        assert sent > 20
        assert (process.returncode, process.stderr.read()) == (code, ""), shown


def test_an_interrupt_that_the_shell_has_ignored_is_ignored(recipe: Path) -> None:
    """Shells that run scripts do so with what they start in the background."""
    script = (
        "import os, signal\n"
        "from mergekit.output.staging import Staging\nwrite = Staging.write\n"
        "Staging.write = lambda *a: (os.kill(os.getpid(), signal.SIGINT), write(*a))[1]\n"
        "import sys; sys.argv[0] = 'mergekit'\nfrom mergekit.cli.main import main; main()"
    )
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT; "$@"', "sh", sys.executable, "-c", script, "merge", "r.yml", "out"], env=ENVIRONMENT
    )
    assert done.returncode == 0


# Standard streams


def shell(redirection: str, *arguments: str, stdout: int = subprocess.PIPE, **variables: Any) -> command.Result:
    """The program with standard streams as a shell sets them."""
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *PROGRAM, *arguments],
        env={**ENVIRONMENT, **variables},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return command.Result(done.returncode, done.stdout or "", done.stderr)


RESULTS = [
    ("merge", "r.yml", "out", "--json"), ("merge", "r.yml", "out", "--dry-run"), ("plan", "r.yml"), ("inspect", "m0"),
    ("inspect", "m0", "--json"), ("methods",), ("--help",), ("new", "m0", "m1", "--no-look"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", RESULTS, ids=" ".join)
def test_results_that_nobody_can_get_are_a_fault(recipe: Path, arguments: tuple[str, ...]) -> None:
    """As they are where a pipe was closed."""
    result = shell(">&-", *arguments)
    assert (result.code, result.out) == (1, "")
    assert "error" not in result.err


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", ""])
def test_an_error_that_no_program_hears_is_a_line(recipe: Path, redirection: str) -> None:
    unread, pipe = os.pipe()
    os.close(unread)
    result = shell(redirection, "merge", "none.yml", "out", "--json", stdout=pipe)
    os.close(pipe)
    assert result.code == 2
    assert result.err.startswith("error: none.yml: cannot read the recipe")


def test_a_merge_needs_no_standard_streams(recipe: Path) -> None:
    """A file that is opened in the place of one would get what is written to it."""
    assert shell("<&- >&- 2>&-", "merge", "r.yml", "out") == command.Result(0, "", "")
    assert command.mergekit("verify", "out").code == 0
    result = shell("2>&-", "merge", "r.yml", "other")
    assert (result.code, result.out) == (0, ""), "remarks don't go to stdout instead"


def test_who_can_not_answer_is_not_asked(recipe: Path) -> None:
    result = shell("<&-", "new", "-o", "new.yml")
    assert result.code == 2
    assert "bug" not in result.err


def test_push_asks_nobody_where_nobody_can_answer(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("m0", str(Path("m0").absolute())))
    assert command.mergekit("merge", "r.yml", "out").code == 0
    result = shell(
        "<&-",
        "push",
        "out",
        "org/model",
        "--quiet",
        HF_TOKEN="hf_x",
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:1",
    )
    assert result.code == 2
    assert result.err.startswith("error: the recipe names folders of this machine, for everyone to read: ")
