"""Every input of ``tests/hostile`` through the command line, offline, in a child process with limits.

Each ends with exit code 1 or 2 and an ``error: ...`` (a few are harmless and merged), soon, in little memory; nothing
is run, nothing appears outside of the output folder, no input changes, and no control character is printed.

Every eighth committed file and all that are built by default, to keep ``make test`` short; ``make hostile``, which
continuous integration calls too, takes all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from command import warm_up
from hostile import sandbox
from hostile.stage import CORPUS, Case, cases

ALL = list(cases())
WHOLE = os.environ.get("MERGEKIT_WHOLE_CORPUS") == "1"
CASES = ALL if WHOLE else [case for number, case in enumerate(ALL) if number % 8 == 0 or "/built-" in case.id]
HARMLESS = frozenset(
    line for line in (CORPUS / "harmless.txt").read_text().splitlines() if line and not line.startswith("#")
)


def run(names: list[str], folder: Path) -> dict[str, sandbox.Outcome]:
    """What the program leaves behind for each of ``names``, in one worker process."""
    wanted = dict.fromkeys(names, sandbox.SECONDS)
    command = [sys.executable, str(CORPUS / "worker.py"), str(folder)]
    done = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: sandbox.Outcome(**record) for name, record in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, sandbox.Outcome]:
    """The outcomes of all cases whose tests are about to run, by id; pickles, which need torch, by themselves."""
    warm_up()
    asked = [item.callspec.params["case"].id for item in request.session.items if hasattr(item, "callspec")
             and isinstance(item.callspec.params.get("case"), Case)]  # fmt: skip
    pickles = [name for name in asked if name.startswith("pickle/")]
    others = [name for name in asked if not name.startswith("pickle/")]
    share = max(len(others) - 150, 0) // 2  # the worker with the pickles has torch to import, and slower forks
    parts = [part for part in (pickles, others[:share], others[share:]) if part]
    folders = [tmp_path_factory.mktemp("worker") for _ in parts]
    found: dict[str, sandbox.Outcome] = {}
    with ThreadPoolExecutor(min(3, os.cpu_count() or 1)) as pool:
        for part in pool.map(run, parts, folders):
            found.update(part)
    return found


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_hostile_input(case, outcomes):
    outcome = outcomes[case.id]
    assert sandbox.broken(outcome) == []
    assert outcome.code in (1, 2) or case.id in HARMLESS, f"accepted: {outcome.err}"


def test_the_corpus_is_small_and_large_enough():
    files = [path for folder in CORPUS.iterdir() if folder.is_dir() for path in folder.iterdir() if path.is_file()]
    files = [path for path in files if "__pycache__" not in str(path)]
    assert len(CASES) >= 150
    assert len({case.id for case in ALL}) == len(ALL)
    assert max(path.stat().st_size for path in files) < 4096
    assert sum(path.stat().st_size for path in files) < 300_000
    assert {case.id for case in ALL} >= HARMLESS


def test_the_sandbox_sees_what_it_looks_for():
    """Otherwise nothing of the above would mean much."""
    sound = sandbox.Outcome(1, "", "error: r.yml: no\n", 0.1, 0)
    assert sandbox.broken(sound) == []
    for changes in (
        {"code": -9}, {"code": 98}, {"err": "Traceback (most recent call last)"}, {"err": "no"}, {"timed_out": True},
        {"err": "error: \x1b[31m"}, {"err": "error: \x85"}, {"memory": 600 << 20}, {"events": ["os.system"]},
        {"changed": ["new work/canary"]}, {"err": "error: this is a bug in mergekit"}, {"err": "error: a\n" * 9},
        {"out": "result"},
    ):  # fmt: skip
        assert sandbox.broken(sandbox.Outcome(**{**sound.record(), **changes})), changes


def test_the_sandbox_tells_of_code_and_writes(tmp_path):
    """The hook itself, in a process of its own: hooks can't be taken away again."""
    text = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from hostile.sandbox import watch
found = []
watch(Path(sys.argv[2]), found.append)
open(sys.argv[2] + "/inside", "w").close()
assert not found, found
for act in (lambda: open(sys.argv[2] + "-outside", "w"), lambda: os.mkdir(sys.argv[2] + "-folder"),
            lambda: os.system("true"), lambda: subprocess.run(["true"])):
    before = len(found)
    act()
    assert len(found) > before, act
"""
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run([sys.executable, "-c", text, str(CORPUS.parent), str(root)], check=True)
