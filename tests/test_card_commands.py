"""The commands at the end of a model card do what they say, for merges that options shaped, too."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mergekit
from command import mergekit as command
from files import write_model, write_recipe
from mergekit.api import RunOptions
from mergekit.options import OPTIONS, shaping_options

ROOT = Path(mergekit.__file__).parent.parent
OWN = """
from mergekit.methods import Elementwise, method

@method("mine_of_the_card", form=Elementwise("weights"), base="ignored", params=[])
def mine(xp, x):
    \"\"\"Half of the first model.\"\"\"
    return 0.5 * x[0]
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def commands(folder: str) -> dict[str, list[str]]:
    """The words of the card's commands by the name of the command, typed for the model in ``folder``."""
    card = Path(folder, "README.md").read_text()
    block = re.findall(r"```sh\n(.*?)```", card, re.S)[-1]
    lines = [shlex.split(line.replace("path/to/this/folder", folder), comments=True) for line in block.splitlines()]
    return {next(w for w in words if w in ("merge", "moe", "reproduce", "verify")): words for words in lines}


def contents(folder: str) -> dict[str, bytes]:
    """The files of a model, but for those that hold its name."""
    named = ("README.md", "merge_report.html")
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name not in named}


@pytest.mark.parametrize("options", [
    [],
    ["--random-seed", "7"],
    ["--unsafe-truncate-embeddings", "--random-seed", "0"],
    ["--out-shard-size", "1500"],
    ["--no-copy-tokenizer", "--no-stats", "--allow-crimes", "--allow-nonfinite"],
    ["--method-file", "my methods.py"],
], ids=lambda options: " ".join(options) or "none")  # fmt: skip
def test_the_commands_of_the_card_give_the_same_bytes(options):
    is_cut = "--unsafe-truncate-embeddings" in options
    for seed, name in enumerate(("base", "a", "b")):
        write_model(Path("models", name), seed, vocab=29 if is_cut and name == "b" else 31)
        Path("models", name, "tokenizer_config.json").write_text("{}")
    Path("my methods.py").write_text(OWN)
    entries = [{"model": f"models/{name}", "parameters": {"weight": 0.5, "density": 0.5}} for name in ("a", "b")]
    recipe = {"merge_method": "dare_ties", "base_model": "models/base", "models": entries, "seed": 3}
    if "--method-file" in options:
        recipe = {"merge_method": "mine_of_the_card", "models": [{"model": "models/a"}, {"model": "models/b"}]}
    write_recipe(Path("r.yml"), yaml.safe_dump(recipe))
    assert command("merge", "r.yml", "runs/out", *options).code == 0
    found = commands("runs/out")
    assert command(*found["merge"][1:]).err.count("wrote again") == 1
    assert contents("again") == contents("runs/out")
    for name in ("reproduce", "verify"):
        done = command(*found[name][1:])
        assert done.code == 0, done.err


def test_the_card_says_where_to_stand():
    write_model(Path("models/a"), 1)
    for number, model in enumerate(("models/a", str(Path.cwd() / "models/a"))):
        mergekit.run_merge({"merge_method": "passthrough", "models": [{"model": model}]}, f"out{number}")
        assert "in the folder where the merge was run" in Path(f"out{number}/README.md").read_text()


def test_the_method_file_of_the_card_has_no_local_path(tmp_path):
    assert shaping_options(RunOptions(method_files=(tmp_path / "a b.py", Path("x/c.py")))) == [
        "--method-file", "'a b.py'", "--method-file", "x/c.py",
    ]  # fmt: skip


def test_every_lasting_option_can_be_typed():
    shaping = {option.shapes for option in OPTIONS if option.shapes}
    assert shaping > set(RunOptions().lasting())
    assert shaping_options(RunOptions()) == []
    assert shaping_options(RunOptions(device="cuda:1", report=True)) == ["--report", "--device", "cuda:1"]


@pytest.mark.parametrize("program", ["mergekit-moe", "phi3_moe.py"])
def test_the_command_of_a_mixture_gives_it_again(program):
    os.symlink(ROOT / "models", "models")
    expert = {"source_model": "models/code", "positive_prompts": ["a"]}
    recipe = {"base_model": "models/base", "experts": [expert, expert], "gate_mode": "random"}
    write_recipe(Path("r.yml"), yaml.safe_dump(recipe))

    def run(*words: str) -> None:
        done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    same = ["--i-understand-this-is-not-useful-without-training", "--random-seed", "5"]
    made = ["mergekit.scripts.phi3_moe"] if program == "phi3_moe.py" else ["mergekit", "moe"]
    run(sys.executable, "-m", *made, "r.yml", "out", *same, "--no-verify")
    block = re.findall(r"```sh\n(.*?)```", Path("out/README.md").read_text(), re.S)[-1]
    words = shlex.split(block.splitlines()[0].replace("path/to/this/folder", "out"), comments=True)
    words = words[1:] if words[0] == "python" else ["-m", *words]
    run(sys.executable, *words, "--no-verify")
    assert contents("again") == contents("out")
