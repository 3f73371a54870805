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
from pathlib import Path

import pytest
import yaml
from click.shell_completion import ShellComplete

import command
import mergekit
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


def test_threads_lose_no_bytes():
    meter = progress.Meter(1, "x")
    workers = [threading.Thread(target=lambda: [meter(1) for _ in range(5000)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert meter.done == 20_000


# A terminal


def in_terminal(arguments: list[str], columns: int, *, interrupt: bool = False, slow: bool = False) -> tuple[int, str]:
    """Run the program in a pseudo-terminal; ``interrupt``: press Ctrl-C as soon as tensors are shown."""
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
    environment = {**inherited, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=child,
        stdout=child,
        stderr=child,
        env=environment,
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
        if interrupt and b"layers.0.w" in shown:
            process.send_signal(signal.SIGINT)
            interrupt = False
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


def test_no_line_is_wider_than_a_narrow_terminal(recipe):
    command.warm_up()
    code, shown = in_terminal(["merge", "r.yml", "out", "-j", "1"], 40, slow=True)
    assert code == 0, shown
    view = CONTROL.sub("", shown.split("\x1b[?25h")[0])
    assert "%" in view
    assert max(map(len, re.split(r"[\r\n]+", view))) <= 40


def test_an_interrupt_restores_the_terminal_and_the_command_goes_on(recipe):
    command.warm_up()
    code, shown = in_terminal(["merge", "r.yml", "out", "-j", "1"], 80, interrupt=True, slow=True)
    assert code == 130, shown
    assert shown.count("\x1b[?25h") == 1
    assert "interrupted; the same command continues" in shown
    assert "Traceback" not in shown
    assert command.mergekit("merge", "r.yml", "out").code == 0


def test_dumb_terminals_get_lines(recipe, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    with progress.progress(10, shown=True) as meter:
        assert type(meter) is progress._Lines


# The end


def test_the_last_word_is_how_to_load_it():
    from mergekit.cli.run import loading

    for names, config, call in (
        (["Phi3ForCausalLM"], {}, 'AutoModelForCausalLM.from_pretrained("out")'),
        (["BertModel"], {}, 'AutoModel.from_pretrained("out")'),
        (["T5ForConditionalGeneration"], {"is_encoder_decoder": True}, 'AutoModelForSeq2SeqLM.from_pretrained("out")'),
        (["X"], {"auto_map": {}}, 'AutoModel.from_pretrained("out", trust_remote_code=True)'),
        (None, {}, 'AutoModel.from_pretrained("out")'),
    ):
        assert loading({"architectures": names, **config}, "out") == call


def test_exit_codes_are_told_once():
    codes = set(boundary.EXIT_CODES)

    def below(kind):
        return {kind.exit_code}.union(*map(below, kind.__subclasses__()))

    assert below(MergekitError) <= codes
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


def test_bash_reads_the_script():
    script = command.mergekit("completion", "bash").out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
