"""What a run shows: a live view in a terminal, lines elsewhere, events for programs; and how it ends."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import pytest
import yaml
from click.shell_completion import ShellComplete

import command
import mergekit
from hub_server import HubServer
from mergekit.cli import boundary, progress
from mergekit.cli.main import mergekit as program
from mergekit.errors import MergekitError
from models import family

ROOT = Path(__file__).parent.parent
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    models = [{"model": folder.name, "parameters": {"weight": 1}} for folder in family(tmp_path, 3, delta=0.01)]
    Path("r.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    return Path("r.yml")


# Events


def events(*args: str) -> tuple[int, list[dict], str]:
    done = command.mergekit(*args)
    return done.code, [json.loads(line) for line in done.out.splitlines()], done.err


def test_a_program_hears_of_everything_on_stdout(recipe):
    code, found, err = events("merge", "r.yml", "out", "--json", "--write-threads", "3")
    assert (code, err) == (0, "")
    kinds = [entry["event"] for entry in found]
    assert kinds[0] == "plan"
    assert kinds[-1] == "done"
    assert set(kinds) <= {"plan", "note", "warning", "message", "progress", "done"}
    plan = mergekit.plan("r.yml")
    assert {key: found[0][key] for key in ("method", "models", "parameters", "bytes_written")} == {
        "method": "linear", "models": ["m0", "m1", "m2"], "parameters": plan.parameters,
        "bytes_written": plan.bytes_written,
    }  # fmt: skip
    assert any("--write-threads changes nothing" in entry["text"] for entry in found if entry["event"] == "note")
    last = [entry for entry in found if entry["event"] == "progress"][-1]
    assert last["bytes"] == last["total"] == sum(output.nbytes for output in plan.outputs)
    assert last["tensor"] in {output.name for output in plan.outputs}
    assert found[-1]["out"] == "out"


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("r.yml", "r.yml"), 2, "UsageError"),
        (("none.yml", "out"), 2, "RecipeError"),
        (("bad.yml", "out"), 2, "ModelNotFoundError"),
    ],
)
def test_errors_are_events_too(recipe, arguments, code, kind):
    Path("bad.yml").write_text("merge_method: passthrough\nmodels: [{model: ./no}]\n")
    status, found, err = events("merge", *arguments, "--json")
    assert (status, err) == (code, "")
    assert (found[-1]["event"], found[-1]["kind"], found[-1]["exit_code"]) == ("error", kind, code)
    assert not boundary.as_events()
    assert "error: " in command.mergekit("merge", *arguments).err  # the next command tells people again


def test_a_dry_run_as_events_writes_nothing(recipe):
    code, found, _ = events("merge", "r.yml", "out", "--json", "--dry-run")
    assert (code, [entry["event"] for entry in found]) == (0, ["plan"])
    assert not Path("out").exists()


def test_events_of_a_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "examples/phi3_moe/recipe.yml").read_text().replace("models/", f"{ROOT}/models/")
    settings = {**yaml.safe_load(text), "gate_mode": "random"}
    for expert in settings["experts"]:
        expert.pop("positive_prompts_file", None)
    Path("r.yml").write_text(yaml.safe_dump(settings))
    code, found, _ = events("moe", "r.yml", "out", "--json", "--no-verify")
    assert code == 0, found
    often = ("progress", "message", "note", "warning")
    assert [entry["event"] for entry in found if entry["event"] not in often] == ["plan", "report", "done"]


@pytest.mark.parametrize("arguments", [("merge", "r.yml"), ("merge", "r.yml", "out", "-j", "x"), ("moe", "r.yml")])
def test_misuse_is_an_event_too(recipe, arguments):
    code, found, err = events(*arguments, "--json")
    assert (code, err, len(found)) == (2, "", 1)
    assert (found[0]["event"], found[0]["kind"], found[0]["exit_code"]) == ("error", "UsageError", 2)


def test_downloads_are_events_and_lines_without_control_codes(tmp_path):
    family(tmp_path, 1)
    Path(tmp_path, "r.yml").write_text("merge_method: passthrough\nmodels: [{model: org/model}]\n")
    for name, arguments, delay in (("events", ["--json"], 0.15), ("lines", [], 0.0)):
        with HubServer({"org/model": tmp_path / "m0"}) as server:
            server.delay = delay
            done = subprocess.run(
                [sys.executable, "-m", "mergekit", "merge", "r.yml", name, *arguments],
                cwd=tmp_path,
                env={**os.environ, **server.environment(tmp_path / f"home-{name}"), "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
        assert done.returncode == 0, done.stderr
        if arguments:
            found = [json.loads(line) for line in done.stdout.splitlines()]
            heard = [entry for entry in found if entry["event"] == "download"]
            assert done.stderr == ""
            assert {entry["model"] for entry in heard} == {"org/model"}
            assert all(0 <= entry["bytes"] <= entry["total"] for entry in heard)
        else:
            assert done.stdout == ""
            assert not re.search(r"[\r\x1b]", done.stderr)
            assert [line.split()[0] for line in done.stderr.splitlines()] == ["wrote", "load"]


# Lines


def test_short_runs_print_no_progress_and_long_ones_a_line_for_each_tenth(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    err = io.StringIO()
    with redirect_stderr(err), progress.progress(1000, shown=True) as meter:
        for _ in range(100):
            meter(1)
            now[0] += 0.05
    assert err.getvalue() == ""
    with redirect_stderr(err), progress.progress(10**9, shown=True, what="reading") as meter:
        meter(3 * 10**8)  # what an earlier run had done
        for _ in range(100):
            now[0] += 5
            meter(7 * 10**6)
    lines = err.getvalue().splitlines()
    assert 8 <= len(lines) <= 20
    shape = re.compile(r"reading: \d+%, [\d.]+ [MG]B of 1 GB, 1.4 MB/s, [\d.]+ (s|min|h) left")
    assert all(map(shape.fullmatch, lines)), lines
    assert not CONTROL.search(err.getvalue())


def test_large_merges_say_at_their_start_what_they_do(recipe, monkeypatch):
    monkeypatch.setattr("mergekit.cli.run._LARGE", 1)
    result = command.mergekit("merge", "r.yml", "out")
    first = result.err.splitlines()[0]
    assert re.fullmatch(r"merging m0, m1, m2 by linear: reads [\d.]+ kB, writes [\d.]+ kB", first)
    assert "merging" not in command.mergekit("merge", "r.yml", "quiet", "--quiet").err


def test_stages_are_lines_and_do_not_count_as_slow_bytes(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    err = io.StringIO()
    with redirect_stderr(err), progress.progress(1000, shown=True) as meter:
        meter(0)
        now[0] += 100
        meter.stage("calibrating")
        meter(0)
        now[0] += 1
        meter(100)
        assert meter.speed() == 100
    assert err.getvalue().splitlines()[0] == "calibrating"
    with redirect_stderr(err), progress.progress(1000, shown=False) as meter:
        meter.compiling(["span"])
    assert "compiling" not in err.getvalue()


def test_a_mixture_that_is_quiet_says_nothing_of_compiling(tmp_path, monkeypatch):
    from mergekit.kernels import warmup

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warmup, "cold_forms", lambda *args: ["span"])
    text = (ROOT / "examples/phi3_moe/recipe.yml").read_text().replace("models/", f"{ROOT}/models/")
    settings = {**yaml.safe_load(text), "gate_mode": "random"}
    for expert in settings["experts"]:
        expert.pop("positive_prompts_file", None)
    Path("r.yml").write_text(yaml.safe_dump(settings))
    result = command.mergekit("moe", "r.yml", "out", "--quiet", "--no-verify")
    assert (result.code, result.err) == (0, "")
    assert "compiling kernels" in command.mergekit("moe", "r.yml", "out2", "--no-verify").err


def test_threads_lose_no_bytes():
    meter = progress.Meter(1, "x")
    workers = [threading.Thread(target=lambda: [meter(1) for _ in range(5000)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert meter.done == 20_000


# A terminal


def in_terminal(
    arguments: list[str], columns: int, *, stop: signal.Signals | None = None, slow: bool = False, **environment: str
) -> tuple[int, str]:
    """Run the program in a pseudo-terminal; ``stop``: the signal that comes as soon as tensors are shown."""
    code = "import sys, time; sys.argv[0] = 'mergekit'\n"
    if slow:
        code += (
            "from mergekit.output.staging import Staging\nwrite = Staging.write\n"
            "Staging.write = lambda *a: (time.sleep(0.4), write(*a))[1]\n"
        )
    code += "from mergekit.cli.main import main; main()"
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    # COLUMNS, which other tests set, would win over the size of the terminal.
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**inherited, "TERM": "xterm", "PYTHONPATH": str(ROOT), **environment},
        start_new_session=True,
    )
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
        if stop and b"layers.0.w" in shown:
            process.send_signal(stop)
            stop = None
    os.close(parent)
    return process.wait(), shown.decode()


def test_the_live_view_shows_bytes_and_tensor_and_goes(recipe):
    command.warm_up()
    code, shown = in_terminal(["merge", "r.yml", "out", "-j", "1"], 100, slow=True)
    assert code == 0, shown
    text = CONTROL.sub("", shown)
    assert re.search(r"merging\s+\S*\s+\d+%", text)
    assert re.search(r"bytes of [\d.]+ kB|kB of [\d.]+ kB", text)
    assert "layers.0.w" in text
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor comes back"
    after = CONTROL.sub("", shown.split("\x1b[?25h")[-1])
    assert [line.strip()[:9] for line in after.split("\r\n") if line.strip()] == ["wrote out", "load it: "]


def test_no_line_is_wider_than_a_narrow_terminal_and_no_color_is_none(recipe):
    command.warm_up()
    code, shown = in_terminal(["merge", "r.yml", "out", "-j", "1"], 40, slow=True, NO_COLOR="1")
    assert code == 0, shown
    assert not re.search(r"\x1b\[[0-9;]*[39][0-7][0-9;]*m", shown)
    view = CONTROL.sub("", shown.split("\x1b[?25h")[0])
    assert "%" in view
    assert max(map(len, re.split(r"[\r\n]+", view))) <= 40


class Screen:
    """As much of a terminal as the view needs: rows of text, a cursor, and wrapping when it is made narrower."""

    def __init__(self) -> None:
        self.rows, self.row, self.column = [""], 0, 0

    def feed(self, text: str) -> None:
        for code, sign in re.findall(r"\x1b\[([0-9;?]*[A-Za-z])|([^\x1b])", text):
            if code == "2K":
                self.rows[self.row] = ""
            elif code.endswith("A"):
                self.row = max(0, self.row - int(code[:-1] or 1))
            elif sign == "\n":
                self.row, self.column = self.row + 1, 0
                self.rows += [""] * (self.row + 1 - len(self.rows))
            elif sign == "\r":
                self.column = 0
            elif sign:
                row = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = row[: self.column] + sign + row[self.column + 1 :]
                self.column += 1

    def narrow(self, columns: int) -> None:
        """The cursor stands at the end of the view, as after each drawing; nothing is below."""
        assert not any(self.rows[self.row + 1 :])
        del self.rows[self.row + 1 :]
        self.rows = [row[i : i + columns] for row in self.rows for i in range(0, max(len(row), 1), columns)]
        self.row, self.column = len(self.rows) - 1, len(self.rows[-1])


def test_a_terminal_that_becomes_narrower_keeps_what_was_said_and_one_view(monkeypatch):
    from rich.live import Live

    from mergekit.cli.view import View

    err = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr("mergekit.cli.view.Live", partial(Live, auto_refresh=False))
    screen = Screen()
    view = View(10**9, "merging")
    view.opened("model.layers.15.block_sparse_moe.experts.3.w1.weight")
    view(10**8)
    with view.shown():
        boundary.say("note: " + "x" * 40)
        for columns in (60, 40, 25):
            screen.feed(err.getvalue().replace("\r\n", "\n"))
            err.seek(0)
            err.truncate()
            screen.narrow(columns)
            view._console._width = columns
            boundary.say(f"narrow: {columns}")
        screen.feed(err.getvalue())
    shown = [row.rstrip() for row in screen.rows]
    assert "".join(shown).startswith("note: " + "x" * 40 + "narrow")
    assert [row for row in shown if row.startswith("narrow")] == ["narrow: 60", "narrow: 40", "narrow: 25"]
    assert sum(row.startswith("merging") for row in shown) == 1
    assert sum("model.layers" in row for row in shown) == 1
    assert max(map(len, shown)) <= 25


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_restores_the_terminal_and_the_command_goes_on(recipe, stop):
    command.warm_up()
    code, shown = in_terminal(["merge", "r.yml", "out", "-j", "1"], 80, stop=stop, slow=True)
    assert code == 128 + stop, shown
    assert shown.count("\x1b[?25h") == 1
    assert shown.rstrip().endswith("interrupted; the same command continues where this one stopped")
    assert "Traceback" not in shown
    assert command.mergekit("merge", "r.yml", "out").code == 0


def test_dumb_terminals_get_lines(recipe, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    with progress.progress(10, shown=True) as meter:
        assert type(meter) is progress._Lines


# The end


def test_the_last_word_is_how_to_load_it():
    from mergekit.families.config import loading

    for names, config, call in (
        (["Phi3ForCausalLM"], {}, 'AutoModelForCausalLM.from_pretrained("out")'),
        (["BertModel"], {}, 'AutoModel.from_pretrained("out")'),
        (["T5ForConditionalGeneration"], {"is_encoder_decoder": True}, 'AutoModelForSeq2SeqLM.from_pretrained("out")'),
        (["X"], {"auto_map": {}}, 'AutoModel.from_pretrained("out", trust_remote_code=True)'),
        (None, {}, 'AutoModel.from_pretrained("out")'),
    ):
        assert loading({"architectures": names, **config}, '"out"') == call


def test_only_what_continues_says_so(recipe, monkeypatch):
    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("mergekit.api.plan", interrupt)
    for arguments, text in (
        (("plan", "r.yml"), "interrupted"),
        (("merge", "r.yml", "out"), "interrupted; the same command continues where this one stopped"),
    ):
        result = command.mergekit(*arguments)
        assert (result.code, result.err.strip()) == (130, text)


def test_exit_codes_are_told_once():
    def below(kind):
        return {kind.exit_code}.union(*map(below, kind.__subclasses__()))

    assert {0, *below(MergekitError), 130, 143} == set(boundary.EXIT_CODES)
    told = " ".join(command.mergekit("--help").out.split())
    assert all(f"{code} {text}" in told for code, text in boundary.EXIT_CODES.items())
    page = (ROOT / "docs" / "terminal.md").read_text()
    for code, text in boundary.EXIT_CODES.items():
        assert f"| {code} | {text} |" in page


def completed(*words: str) -> list[str]:
    *before, incomplete = words
    return [item.value for item in ShellComplete(program, {}, "mergekit", "_X").get_completions(before, incomplete)]


def test_shells_complete():
    assert completed("me") == ["merge", "methods"]
    assert "--overwrite" in completed("merge", "--over")
    assert sorted(completed("methods", "dare")) == ["dare_linear", "dare_ties"]
    kinds = {item.type for item in ShellComplete(program, {}, "mergekit", "_X").get_completions(["merge"], "r")}
    assert kinds == {"file"}
    for shell in ("bash", "zsh", "fish"):
        done = command.mergekit("completion", shell)
        assert (done.code, done.err) == (0, "")
        assert "_MERGEKIT_COMPLETE" in done.out
    assert command.mergekit("completion", "tcsh").code == 2


@pytest.mark.parametrize(
    ("line", "found"),
    [("mergekit me", {"plain,merge", "plain,methods"}), ("mergekit merge --js", {"plain,--json"}),
     ("mergekit methods dare_t", {"plain,dare_ties"}), ("mergekit verify o", {"file,o"})],
)  # fmt: skip
def test_bash_asks_the_program(line, found):
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_MERGEKIT_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-m", "mergekit"],
        env={**os.environ, **words, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert set(done.stdout.split()) == found
    assert done.stderr == ""


def test_without_a_shell_completion_says_how_to_use_it():
    done = command.mergekit("completion")
    assert (done.code, done.err) == (0, "")
    assert 'eval "$(mergekit completion bash)"' in done.out


def test_bash_reads_the_script():
    script = command.mergekit("completion", "bash").out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
