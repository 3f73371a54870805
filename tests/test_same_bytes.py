"""Same recipe, same bytes: any number of threads, any block size, interrupted and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import mergekit
from mergekit import api
from mergekit.dtypes import BF16
from mergekit.errors import ResumeError, UsageError
from mergekit.execute import run_threads, work
from mergekit.methods import get_method, method_names
from mergekit.output.staging import STAGING
from models import family, write_model

METHODS = method_names()
SHAPES = {"embed.weight": (1031, 17), "layers.0.w": (521, 127), "layers.1.w": (521, 127), "tail": (3,)}


def recipe_for(name: str, folders: list[Path]) -> dict:
    method = get_method(name)
    if method.most == 1:
        return {"merge_method": name, "models": [{"model": str(folders[0])}]}
    others = folders[1 : method.most if method.base == "required" else None]
    models = [{"model": str(f), "parameters": {"weight": 0.5 + i, "density": 0.4}} for i, f in enumerate(others)]
    parameters = {"t": [0.2, 0.8], "rescale": True, "nuslerp_flatten": False, "filter_wise": True, "select_topk": 0.3}
    parameters = {key: value for key, value in parameters.items() if method.parameter(key)}
    base = {"model": str(folders[0]), "parameters": {"weight": 0.1}}
    return {"merge_method": name, "base_model": str(folders[0]), "models": [base, *models], "parameters": parameters}


def result(folder: Path) -> dict[str, bytes]:
    return {n: (folder / n).read_bytes() for n in ("model.safetensors", "config.json")}


class Collect:
    """A sink that keeps everything in memory."""

    def __init__(self, plan) -> None:
        self.data = {o.name: bytearray(o.nbytes) for o in plan.outputs}
        self.sums: dict[str, int] = {}

    def write(self, output, start, data):
        self.data[output.name][start : start + len(data)] = data.tobytes()

    def finish(self, output, checksum, figures):
        self.sums[output.name] = checksum

    def note(self, text):
        raise AssertionError(text)


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_blocks_do_not_matter(tmp_path, monkeypatch, method):
    monkeypatch.setattr(work, "RANGE", 1 << 13)  # several ranges a tensor
    plan = mergekit.plan(recipe_for(method, family(tmp_path, 3, BF16, SHAPES)))
    results = []
    for threads, block in ((1, None), (2, 1024), (5, 3072), (2, None)):
        sink = Collect(plan)
        run_threads(plan, sink, threads=threads, block=block)
        results.append((sink.data, sink.sums))
    assert all(r == results[0] for r in results)


def test_ties_over_many_ranges_equal_one_range(tmp_path, monkeypatch):
    """Exact selection with many equal magnitudes: ranges must share out the ties by index."""
    rng = np.random.default_rng(7)
    folders = [
        write_model(tmp_path / f"m{i}", {"w": rng.integers(-3, 4, (97, 1031)).astype(np.float32)}) for i in range(3)
    ]
    plan = mergekit.plan(recipe_for("ties", folders))
    whole = Collect(plan)
    run_threads(plan, whole, threads=1)
    monkeypatch.setattr(work, "RANGE", 1 << 13)
    parts = Collect(plan)
    run_threads(plan, parts, threads=3)
    assert whole.data == parts.data


def test_seed_changes_random_methods_only(tmp_path):
    folders = family(tmp_path, 3, BF16, SHAPES)
    runs = {}
    for method in ("dare_ties", "ties"):
        for seed in (0, 0, 1):
            out = tmp_path / f"{method}{seed}{len(runs)}"
            mergekit.run_merge(recipe_for(method, folders), out, seed=seed)
            runs.setdefault(method, []).append(result(out)["model.safetensors"])
    assert runs["dare_ties"][0] == runs["dare_ties"][1] != runs["dare_ties"][2]
    assert runs["ties"][0] == runs["ties"][1] == runs["ties"][2]


def interrupt_after(monkeypatch, count: int) -> None:
    """Make the merge fail after ``count`` finished tensors, as an interrupt would."""
    from mergekit.output.staging import Staging

    finish, seen = Staging.finish, []

    def stop(self, output, checksum, figures):
        finish(self, output, checksum, figures)
        seen.append(output)
        if len(seen) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "finish", stop)


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed(tmp_path, monkeypatch, method):
    recipe = recipe_for(method, family(tmp_path, 3, BF16, SHAPES))
    mergekit.run_merge(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            mergekit.run_merge(recipe, tmp_path / "out", threads=1)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    before = []
    mergekit.run_merge(recipe, tmp_path / "out", advance=before.append)
    assert before[0] > 0  # some tensors were not computed again
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    assert not (tmp_path / "out" / STAGING).exists()


def test_damaged_partial_work_is_done_again(tmp_path, monkeypatch):
    recipe = recipe_for("linear", family(tmp_path, 3, BF16, SHAPES))
    mergekit.run_merge(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            mergekit.run_merge(recipe, tmp_path / "out", threads=1)
    shard = tmp_path / "out" / STAGING / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[700] ^= 1
    shard.write_bytes(raw)
    journal = tmp_path / "out" / STAGING / "journal"
    journal.write_bytes(journal.read_bytes() + b"deadbeef {torn")
    mergekit.run_merge(recipe, tmp_path / "out")
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_partial_work_of_another_recipe_is_refused(tmp_path, monkeypatch):
    folders = family(tmp_path, 3, BF16, SHAPES)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            mergekit.run_merge(recipe_for("linear", folders), tmp_path / "out", threads=1)
    with pytest.raises(ResumeError, match=r"the recipe or its options changed.*--restart"):
        mergekit.run_merge(recipe_for("ties", folders), tmp_path / "out")
    family(tmp_path, 1, BF16, SHAPES, delta=0.1)  # writes the base's file anew
    os.utime(folders[0] / "model.safetensors", ns=(1, 1))
    with pytest.raises(ResumeError, match="the input files changed"):
        mergekit.run_merge(recipe_for("linear", folders), tmp_path / "out")
    mergekit.run_merge(recipe_for("ties", folders), tmp_path / "out", restart=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_two_merges_into_one_folder_are_refused(tmp_path):
    plan = mergekit.plan(recipe_for("linear", family(tmp_path, 3, BF16, SHAPES)))
    from mergekit.output.staging import Staging

    with (
        Staging(tmp_path / "out", plan),
        pytest.raises(UsageError, match="another merge is writing"),
        Staging(tmp_path / "out", plan),
    ):
        pass


def test_killed_and_resumed(tmp_path):
    """A real kill -9 in the middle, then the same command again."""
    shapes = {f"layers.{i}.w": (509, 2003) for i in range(24)}
    recipe = tmp_path / "r.yml"
    recipe.write_text(yaml.safe_dump(recipe_for("dare_ties", family(tmp_path, 3, BF16, shapes))))
    script = (
        "import sys; from mergekit.output import staging; staging._COMMIT_SECONDS = 0.01\n"
        "import mergekit; mergekit.run_merge(sys.argv[1], sys.argv[2], threads=1)"
    )
    command = [sys.executable, "-c", script, str(recipe)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    journal = tmp_path / "out" / STAGING / "journal"
    process = subprocess.Popen([*command, str(tmp_path / "out")])
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "config.json").exists()
    subprocess.run([*command, str(tmp_path / "out")], check=True)
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_journal_digest_ignores_what_a_run_may_change(tmp_path):
    recipe = recipe_for("linear", family(tmp_path, 3, BF16, SHAPES))
    digests = {api.plan(recipe, api.RunOptions(threads=t, quiet=q)).digest() for t in (1, 5) for q in (True, False)}
    assert len(digests) == 1
