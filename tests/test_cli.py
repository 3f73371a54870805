"""The command line: what it prints, what it accepts, and how it ends.

What it prints is kept in ``snapshots/``. If a change is meant, write them anew and read the difference in git:

    MERGEKIT_UPDATE_SNAPSHOTS=1 python -m pytest tests/test_cli.py
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

import mergekit as package
from command import Result, assert_refused, mergekit, mergekit_yaml, warm_up
from files import LAYERS, llama, read_model, write_model, write_recipe
from mergekit.cli.boundary import plain
from mergekit.cli.main import _COMMANDS
from mergekit.cli.merge import merge as merge_command
from mergekit.cli.moe import moe as moe_command
from mergekit.cli.plan import plan as plan_command
from mergekit.cli.show import size
from mergekit.errors import MergekitError, UsageError
from mergekit.merge import MergeOptions
from mergekit.options import OPTIONS, parse_kmb

SNAPSHOTS = Path(__file__).parent / "snapshots"
RECIPE = """
merge_method: ties
base_model: a
models:
- model: b
  parameters:
    weight: [0.25, 1]
    density:
    - {filter: mlp, value: 0.5}
    - {value: 0.25}
- model: c
  parameters: {weight: 1, t: 0.5}
parameters: {int8_mask: true}
dtype: float16
"""


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Work in a folder with three small models, on a terminal of 80 columns."""
    warm_up()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for seed, name in enumerate("abc"):
        write_model(Path(name), seed)
    Path("a/tokenizer.json").write_text("{}")
    write_recipe(Path("r.yml"), RECIPE)


def same_as_snapshot(name: str, text: str) -> None:
    """``text`` is that of ``snapshots/<name>.txt``, which is written anew when the environment says so."""
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("MERGEKIT_UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; if that is meant, run with MERGEKIT_UPDATE_SNAPSHOTS=1"


def both(result: Result) -> str:
    """What a person would see: stdout, then stderr."""
    return result.out + result.err


SHOWN = {
    "help": ["--help"],
    "help-merge": ["merge", "--help"],
    "help-moe": ["moe", "--help"],
    "help-plan": ["plan", "--help"],
    "help-methods": ["methods", "--help"],
    "help-push": ["push", "--help"],
    "methods": ["methods"],
    "methods-ties": ["methods", "ties"],
    "methods-passthrough": ["methods", "passthrough"],
    "plan": ["plan", "r.yml", "-j", "2"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_printed(name):
    result = mergekit(*SHOWN[name])
    assert result.code == 0
    same_as_snapshot(name, both(result))


def test_help_of_mergekit_yaml_is_that_of_merge():
    result = mergekit_yaml("--help")
    assert result.code == 0
    same_as_snapshot("help-merge", result.out.replace("mergekit-yaml", "mergekit merge"))


def test_a_merge_prints_this():
    result = mergekit_yaml("r.yml", "out", "--write-threads", 3)
    assert result.code == 0
    assert result.out == ""
    *lines, last, loading = result.err.splitlines()
    same_as_snapshot("merge", "\n".join(lines) + "\n")
    assert loading == 'load it: AutoModelForCausalLM.from_pretrained("out")   check it: mergekit verify out'
    assert last.startswith("wrote out: 1,260 parameters, 4.25 kB, in ")


def test_verbose_prints_the_plan_too():
    plan = mergekit("plan", "r.yml", "-j", 2).out
    result = mergekit_yaml("r.yml", "out", "-v", "-j", 2)
    assert result.out == ""
    assert plan in result.err
    assert plan not in mergekit_yaml("r.yml", "out2", "-j", 2).err


def test_quiet_prints_warnings_only():
    result = mergekit_yaml("r.yml", "out", "--quiet", "-v", "--multi-gpu")
    assert result.code == 0
    assert result.out == ""
    assert result.lines() == result.lines("warning") == [
        "warning: r.yml:11:27: 'ties' has no parameter 't' (it belongs to slerp, nearswap); ignored"
    ]  # fmt: skip


def test_quiet_says_nothing_of_compiling(monkeypatch):
    from mergekit.kernels import warmup

    monkeypatch.setattr(warmup, "cold_forms", lambda *args: ["span"])
    write_recipe(Path("q.yml"), "merge_method: passthrough\nmodels: [{model: b}]")
    assert mergekit_yaml("q.yml", "out", "--quiet").err == ""
    assert "compiling kernels" in mergekit_yaml("q.yml", "out2").err


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("is_terminal", "args", "shown"), [
    (True, [], True), (True, ["--quiet"], False), (False, [], False),
])  # fmt: skip
def test_progress_is_for_terminals(monkeypatch, is_terminal, args, shown):
    monkeypatch.setattr(sys, "argv", ["mergekit-yaml", "r.yml", "out", *args])
    monkeypatch.setattr(sys, "stderr", Terminal() if is_terminal else io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    from mergekit.cli.merge import main

    monkeypatch.setattr(
        "mergekit.cli.signals.listen", lambda: None
    )  # its end would be that of interrupts in this process
    main()
    text = sys.stderr.getvalue()
    assert ("\x1b[" in text) is shown
    assert ("merging" in text) is shown


# Plans


def test_a_plan_as_json_is_complete():
    result = mergekit("plan", "r.yml", "--json", "-j", 2)
    assert result.code == 0
    assert result.err == ""
    record = json.loads(result.out)
    plan = package.plan("r.yml")
    assert record["method"] == "ties"
    assert record["models"] == ["b", "c", "a"]
    assert record["base"] == "a"
    assert record["digest"] == plan.digest()
    assert record["parameters"] == sum(array.size for _, array in llama(0).values())
    assert record["bytes_written"] == sum(shard["bytes"] for shard in record["shards"])
    assert record["memory"] > 0
    assert record["files"] == [{"from": "a", "name": "tokenizer.json"}]
    assert record["warnings"] == list(plan.warnings)
    assert record["notes"] == list(plan.notes)
    assert record["left_out"] == []
    assert [t["name"] for t in record["tensors"]] == [o.name for o in plan.outputs]
    assert {t["name"] for t in record["tensors"]} == set(llama(0))
    for tensor in record["tensors"]:
        assert tensor["bytes"] == 2 * llama(0)[tensor["name"]][1].size
        assert tensor["shape"] == list(llama(0)[tensor["name"]][1].shape)
        assert tensor["dtype"] == "float16"
        assert tensor["file"] == "model.safetensors"
        assert [i["model"] for i in tensor["inputs"]] == ["a", "b", "c"]
        assert {i["tensor"] for i in tensor["inputs"]} == {tensor["name"]}
        assert tensor["parameters"]["density"] == [0.5 if "mlp" in tensor["name"] else 0.25, 1]
    last = next(t for t in record["tensors"] if f"layers.{LAYERS - 1}.mlp.up" in t["name"])
    assert last["parameters"]["weight"] == [1, 1]


def test_a_plan_tells_of_what_the_merge_will_do():
    record = json.loads(mergekit("plan", "r.yml", "--json", "--out-shard-size", 999).out)
    assert mergekit_yaml("r.yml", "out", "--out-shard-size", 999).code == 0
    assert {s["file"]: s["bytes"] for s in record["shards"]} == {
        path.name: path.stat().st_size for path in Path("out").glob("*.safetensors")
    }


@pytest.mark.parametrize("command", [["plan", "r.yml"], ["merge", "r.yml", "out", "--dry-run"]])
def test_looking_first_writes_nothing(command):
    before = sorted(Path().rglob("*"))
    result = mergekit(*command)
    assert result.code == 0
    same_as_snapshot("plan", both(mergekit(*command, "-j", 2)))
    assert sorted(Path().rglob("*")) == before


def test_a_dry_run_is_refused_where_the_run_would_be():
    Path("out").mkdir()
    Path("out/model.safetensors").touch()
    assert_refused(mergekit("merge", "r.yml", "out", "--dry-run"), 2, "out already holds weights")


# Options

FLAGS = """
--allow-crimes --no-allow-crimes --allow-nonfinite --no-allow-nonfinite --async-write --no-async-write --clone-tensors
--no-clone-tensors --copy-tokenizer --no-copy-tokenizer --cuda --no-cuda --device --gpu-rich --no-gpu-rich
--lazy-unpickle --no-lazy-unpickle --lora-merge-cache --lora-merge-dtype --low-cpu-memory --no-low-cpu-memory
--max-memory --method-file --multi-gpu --no-multi-gpu --num-threads -j --out-shard-size --overwrite --no-overwrite
--quiet --no-quiet --report --no-report
--random-seed --read-to-gpu --no-read-to-gpu --restart --no-restart --safe-serialization --no-safe-serialization
--stats --no-stats --transformers-cache --trust-remote-code --no-trust-remote-code --unsafe-truncate-embeddings
--no-unsafe-truncate-embeddings --verbose -v --write-model-card --no-write-model-card --write-threads
""".split()  # noqa: SIM905
"""The options of a merge. A word that changes the result belongs in the recipe, not here."""


MOE_FLAGS = """
--verify --no-verify --i-understand-this-is-not-useful-without-training --load-in-4bit --load-in-8bit
""".split()  # noqa: SIM905


def flags(command: click.Command) -> set[str]:
    options = [p for p in command.params if isinstance(p, click.Option)]
    return {flag for option in options for flag in (*option.opts, *option.secondary_opts)}


def test_the_flags_are_frozen():
    assert flags(merge_command) == {*FLAGS, "--dry-run", "--json", "--version"}
    assert flags(plan_command) == {*FLAGS, "--html", "--json"}
    assert flags(moe_command) == {*FLAGS, *MOE_FLAGS, "--dry-run", "--json", "--version"}
    assert list(_COMMANDS) == [
        "new", "merge", "moe", "lora", "plan", "explain", "inspect", "diff", "tokenizer", "methods", "verify",
        "reproduce", "report", "push", "warmup", "completion",
    ]  # fmt: skip


COMMON = {
    "--allow-crimes": 0, "--no-allow-crimes": 0, "--unsafe-truncate-embeddings": 0,
    "--no-unsafe-truncate-embeddings": 0, "--trust-remote-code": 0, "--no-trust-remote-code": 0,
    "--transformers-cache": "cache", "--lora-merge-cache": "cache", "--lora-merge-dtype": "bfloat16",
    "--no-cuda": 0, "--device": "cpu", "--low-cpu-memory": 0, "--no-low-cpu-memory": 0, "--read-to-gpu": 0,
    "--no-read-to-gpu": 0, "--multi-gpu": 0, "--no-multi-gpu": 0, "-j": "1", "--num-threads": "2",
    "--lazy-unpickle": 0, "--no-lazy-unpickle": 0, "--async-write": 0, "--no-async-write": 0, "--write-threads": "4",
    "--out-shard-size": "1B", "--copy-tokenizer": 0, "--no-copy-tokenizer": 0, "--clone-tensors": 0,
    "--no-clone-tensors": 0, "--write-model-card": 0, "--no-write-model-card": 0, "--safe-serialization": 0,
    "--random-seed": "7", "-v": 0, "-vv": 0, "--quiet": 0, "--no-quiet": 0,
}  # fmt: skip
"""Options of arcee mergekit that work on any machine; 0: it takes no value."""


def test_old_commands_are_accepted_in_full():
    """Every option at once, as copied from some old script."""
    args = [text for flag, value in COMMON.items() for text in ([flag, value] if value else [flag])]
    assert mergekit_yaml("r.yml", "out", *args).code == 0
    assert {flag for flag in FLAGS if not flag.startswith("--no-")} <= {
        *COMMON, "--cuda", "--gpu-rich", "--verbose", "--overwrite", "--restart", "--allow-nonfinite", "--stats",
        "--method-file", "--report", "--max-memory",
    }  # fmt: skip


@pytest.mark.parametrize("flag", COMMON)
def test_every_common_option_is_accepted(flag):
    result = mergekit_yaml("r.yml", "out", flag, *([COMMON[flag]] if COMMON[flag] else []))
    assert result.code == 0, result.err
    assert Path("out/config.json").exists()


UNUSED = [option for option in OPTIONS if option.unused and option.field != "safe_serialization"]


@pytest.mark.parametrize("option", UNUSED, ids=lambda option: option.field)
def test_options_without_effect_say_so(option):
    flag = option.flags[-1].split("/")[0]
    assert mergekit_yaml("r.yml", "plain").code == 0
    result = mergekit_yaml("r.yml", "out", flag, *([COMMON[flag]] if COMMON[flag] else []))
    assert result.lines("note")[0] == f"note: {flag} changes nothing: {option.unused}"
    assert Path("out/model.safetensors").read_bytes() == Path("plain/model.safetensors").read_bytes()


def test_options_that_are_not_given_are_not_mentioned():
    assert not any("--" in line for line in mergekit_yaml("r.yml", "out").lines("note"))


def test_pickles_are_not_written():
    result = mergekit_yaml("r.yml", "out", "--no-safe-serialization")
    assert_refused(result, 2, "--no-safe-serialization", "only safetensors are written", "torch.save()")
    assert not Path("out").exists()


def test_cards_and_tokenizers_can_be_left_out():
    assert mergekit_yaml("r.yml", "out", "--no-write-model-card", "--no-copy-tokenizer", "--no-stats").code == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["config.json", "model.safetensors"]
    assert mergekit_yaml("r.yml", "out2").code == 0
    assert sorted(p.name for p in Path("out2").iterdir()) == [
        "README.md", "config.json", "merge_manifest.json", "merge_stats.json", "mergekit_config.yml",
        "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_overwriting_replaces_the_old_model():
    assert mergekit_yaml("r.yml", "out", "--out-shard-size", "1k").code == 0
    assert len(list(Path("out").glob("*.safetensors"))) > 2
    assert_refused(mergekit_yaml("r.yml", "out"), 2, "out already holds weights", "--overwrite")
    assert mergekit_yaml("r.yml", "out", "--overwrite").code == 0
    assert [p.name for p in Path("out").glob("model*")] == ["model.safetensors"]


SIZES = {"5": 5, "0": 0, "1B": 10**9, "500m": 5 * 10**8, "5GB": 5 * 10**9, "1.5B": 1_500_000_000, "2k": 2000,
         "2KB": 2000, "1mb": 10**6, " 3 G ": 3 * 10**9, "0.5k": 500}  # fmt: skip


@pytest.mark.parametrize("text", SIZES)
def test_sizes_of_shards(text):
    assert parse_kmb(text) == SIZES[text]
    assert mergekit("plan", "r.yml", "--out-shard-size", text).code == 0


@pytest.mark.parametrize("text", ["", "-1", "x", "1T", "1e3", "inf", "nan", "1_000", ".5b", "5 5", "B", "1,5B", "٣"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_kmb(text)
    assert_refused(mergekit_yaml("r.yml", "out", f"--out-shard-size={text}"), 2, "is not a size; write", "500m, 5B")


def test_shards_hold_no_more_than_asked_for():
    assert mergekit_yaml("r.yml", "one").code == 0
    assert mergekit_yaml("r.yml", "out", "--out-shard-size", "1k").code == 0
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    merged = read_model(Path("out"))
    for shard in set(index["weight_map"].values()):
        held = [merged[name][1].nbytes for name, file in index["weight_map"].items() if file == shard]
        assert len(held) == 1 or sum(held) <= 1000
    assert {n: a.tobytes() for n, (_, a) in merged.items()} == {
        n: a.tobytes() for n, (_, a) in read_model(Path("one")).items()
    }


USAGE: list[tuple[list[str], str]] = [
    ([], "missing argument 'CONFIG_FILE'"),
    (["r.yml"], "missing argument 'OUT_PATH'"),
    (["r.yml", "out", "more"], "unexpected extra argument"),
    (["r.yml", "out", "--nope"], "no such option"),
    (["r.yml", "out", "-j", "x"], "'x' is not a valid integer"),
    (["r.yml", "out", "--out-shard-size"], "requires an argument"),
]


@pytest.mark.parametrize(("args", "phrase"), USAGE)
def test_usage(args, phrase):
    result = mergekit_yaml(*args)
    assert result.code == 2
    assert phrase in result.err
    assert result.out == ""
    assert not Path("out").exists()


VALUES: list[tuple[list[str], str]] = [
    (["-j", "0"], "--num-threads 0: give at least 1"),
    (["-j", "-3"], "--num-threads -3: give at least 1"),
    (["--random-seed", "-1"], "--random-seed -1: give a whole number from 0"),
    (["--random-seed", str(1 << 63)], "give a whole number from 0 to 2^63 - 1"),
    (["--device", "abacus"], "'abacus' is not a device; write cpu, cuda"),
]


@pytest.mark.parametrize(("args", "phrase"), VALUES)
def test_values_of_options(args, phrase):
    import torch  # noqa: F401 (its import is not what we time)

    assert_refused(mergekit_yaml("r.yml", "out", *args), 2, phrase)


@pytest.mark.parametrize("args", [["--cuda"], ["--gpu-rich"], ["--device", "cuda"], ["--device", "cuda:1"]])
def test_a_device_that_is_not_there(args, monkeypatch):
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert_refused(mergekit_yaml("r.yml", "out", *args), 2, "there is no cuda device", "use --device cpu")


def test_the_processor_has_one_name():
    assert MergeOptions(device="cpu:0").run_options().device == "cpu"
    assert MergeOptions().run_options().device == "cpu"


@pytest.mark.parametrize("args", [["methods", "tiez"], ["methods", "x"]])
def test_a_method_that_is_none(args):
    assert_refused(mergekit(*args), 2, f"no merge method '{args[1]}'", "ties")


def test_a_command_that_is_none():
    result = mergekit("frobnicate")
    assert result.code == 2
    assert "no such command 'frobnicate'" in result.err


def test_no_command_shows_help():
    result = mergekit()
    assert result.code == 2
    same_as_snapshot("help", both(result))


@pytest.mark.parametrize("args", [["--version"], ["merge", "--version"]])
def test_version(args):
    assert mergekit(*args).out == f"mergekit, version {package.__version__}\n"


# The border


def ends_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Result:
    """The result of a command in which ``error`` is raised."""

    def fail(*args: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr("mergekit.api.plan", fail)
    return mergekit_yaml("r.yml", "out")


FAULTS: list[tuple[BaseException, int, str]] = [
    (MergekitError("this and that"), 1, "error: this and that\n"),
    (UsageError("this and that"), 2, "error: this and that\n"),
    (KeyboardInterrupt(), 130, "interrupted; the same command continues where this one stopped\n"),
    (MemoryError(), 1, "error: out of memory; close other programs, or use fewer threads (-j 1)\n"),
    (OSError(5, "Input/output error", "x/model.safetensors"), 1, "error: Input/output error: x/model.safetensors\n"),
    (PermissionError(13, "Permission denied"), 1, "error: Permission denied\n"),
    (ZeroDivisionError("oh"), 1, "error: this is a bug in mergekit: ZeroDivisionError: oh\n"
                                 "run again with MERGEKIT_DEBUG=1 for the details, and please report them\n"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "text"), FAULTS, ids=lambda value: type(value).__name__)
def test_faults_become_a_few_lines_and_an_exit_code(monkeypatch, error, code, text):
    result = ends_with(monkeypatch, error)
    assert result.code == code
    assert result.err.lstrip("\n") == text
    assert result.out == ""


def test_the_curious_get_the_traceback(monkeypatch):
    monkeypatch.setenv("MERGEKIT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        ends_with(monkeypatch, ZeroDivisionError("oh"))


def test_what_is_printed_can_not_steer_the_terminal():
    assert plain("a\x1b[31mb\x07\rc\x9b\x00") == "a\\x1b[31mb\\x07\\rc\\x9b\\x00"
    assert plain("two\nlines, é 漢 \ud800") == "two\nlines, é 漢 \\ud800"
    for code in (0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)):
        assert plain(f"w{chr(code)}gnp.exe") == f"w\\u{code:04x}gnp.exe", "text that runs another way"
    assert len(plain("x" * 5000 + "\n" + "y" * 5000).splitlines()[1]) < 1000


def test_sizes_for_people():
    numbers = [0, 999, 1000, 4248, 999_400, 999_600, 2_200_000_000, 14_960_000_000_000]
    assert [size(n) for n in numbers] == [
        "0 bytes", "999 bytes", "1 kB", "4.25 kB", "999 kB", "1 MB", "2.2 GB", "15 TB",
    ]  # fmt: skip


# Processes of their own


def process(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60, **more)


HEAVY = {"torch", "transformers", "numba", "numpy", "pydantic", "yaml", "huggingface_hub", "rich", "jinja2"}


@pytest.mark.parametrize(("module", "args"), [
    ("main", ["mergekit", "--help"]), ("main", ["mergekit", "plan", "--help"]), ("merge", ["mergekit-yaml", "--help"]),
    ("moe", ["mergekit-moe", "--help"]),
    ("main", ["mergekit", "--version"]),
])  # fmt: skip
def test_help_loads_nothing_heavy(module, args):
    code = f"import sys; sys.argv = {args}\nfrom mergekit.cli.{module} import main\nmain()\nprint(*sys.modules)"
    done = process("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    modules = set(done.stdout.splitlines()[-1].split())
    assert "click" in modules
    assert not modules & HEAVY


def test_the_module_is_the_program():
    done = process("-m", "mergekit", "merge", "r.yml", "out", "--quiet")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == mergekit_yaml("r.yml", "out2", "--quiet").lines()
    assert Path("out/model.safetensors").read_bytes() == Path("out2/model.safetensors").read_bytes()


@pytest.mark.parametrize(("recipe", "code"), [(RECIPE.replace("ties", "tiez"), 2), (RECIPE.replace(" c", " d"), 1)])
def test_exit_codes_reach_the_shell(recipe, code):
    write_recipe(Path("r.yml"), recipe)
    write_model(Path("d"))
    Path("d/model.safetensors").write_text("<html>")
    done = process("-m", "mergekit", "merge", "r.yml", "out")
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not Path("out").exists()


def test_a_closed_pipe_is_no_fault():
    """``mergekit plan r.yml | head -1``."""
    command = [sys.executable, "-m", "mergekit", "plan", "r.yml", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        errors = running.stderr.read()
    assert "Traceback" not in errors
    assert "bug" not in errors


def test_an_interrupt_ends_with_130():
    code = (
        "import time, mergekit.api\nmergekit.api.plan = lambda *a, **k: (print('go', flush=True), time.sleep(30))\n"
        "import sys; sys.argv = ['mergekit-yaml', 'r.yml', 'out']\nfrom mergekit.cli.merge import main\nmain()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline() == "go\n"
        time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        errors = run.stderr.read()
    assert run.returncode == 130
    assert errors.strip() == "interrupted; the same command continues where this one stopped"
