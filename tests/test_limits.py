"""Memory is known before a run starts, and a limit is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mergekit
from command import mergekit_yaml, warm_up
from mergekit.api import RunOptions, limits
from mergekit.dtypes import BF16
from mergekit.errors import UsageError
from models import family

needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc"
)


def recipe(folders: list[Path], method: str) -> dict[str, object]:
    models = [{"model": str(f)} for f in folders[1:]]
    base = {} if method in ("linear", "karcher") else {"base_model": str(folders[0])}
    values = {"linear": {"weight": 0.5}, "sce": {"select_topk": 0.5}}.get(method, {"weight": 0.5, "density": 0.5})
    return {"merge_method": method, "models": models, "parameters": values, "dtype": "bfloat16", **base}


SCRIPT = """
import sys, mergekit
from mergekit.api import RunOptions, memory
options = RunOptions(threads=int(sys.argv[3]))
estimate = memory(mergekit.plan(sys.argv[1], options), options)
mergekit.run_merge(sys.argv[1], sys.argv[2], options, max_memory=estimate)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(estimate, int(peak) * 1024)
"""


@needs_proc
@pytest.mark.parametrize("method", ["linear", "della", "sce"])
def test_what_a_merge_needs_is_no_more_than_the_plan_says(tmp_path, method):
    """With kernels that are compiled already; the estimate is accepted as the limit."""
    folders = family(tmp_path, 3, BF16, {"w": (4096, 1024), "v": (2048, 1024)})
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe(folders, method)))
    warm_up()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "r.yml"), str(tmp_path / "out"), "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    estimate, peak = map(int, done.stdout.split())
    assert 0.5 * estimate < peak <= estimate


def test_threads_are_left_out_as_need_be(tmp_path, monkeypatch):
    folders = family(tmp_path, 3, BF16, {"w": (300, 100)})
    monkeypatch.setattr(limits, "_peak", lambda: 0)
    options = RunOptions(threads=8)
    plan = mergekit.plan(recipe(folders, "ties"), options)
    full = limits.memory(plan, options)
    assert limits.admit(plan, RunOptions(threads=8, max_memory=full)).threads == 8
    fewer = limits.admit(plan, RunOptions(threads=8, max_memory=full - 1)).threads
    assert fewer is not None
    assert 1 <= fewer < 8
    least = limits.memory(plan, RunOptions(threads=1))
    assert limits.admit(plan, RunOptions(threads=8, max_memory=least)).threads == 1
    with pytest.raises(UsageError, match=rf"needs {-(-least // 10**6)}MB even with one thread"):
        limits.admit(plan, RunOptions(threads=8, max_memory=least - 10**6))


def test_what_the_process_has_taken_counts(tmp_path, monkeypatch):
    plan = mergekit.plan(recipe(family(tmp_path, 3, BF16, {"w": (30, 10)}), "linear"))
    monkeypatch.setattr(limits, "_peak", lambda: 2_000_000_000)
    with pytest.raises(UsageError, match="even with one thread"):
        limits.admit(plan, RunOptions(max_memory=1_000_000_000))
    assert limits.admit(plan, RunOptions(max_memory=4_000_000_000, threads=2)).threads == 2


def test_a_merge_that_cannot_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yml").write_text(yaml.safe_dump(recipe(family(tmp_path, 3, BF16, {"w": (30, 10)}), "linear")))
    result = mergekit_yaml("r.yml", "out", "--max-memory", "50MB")
    assert result.code == 2
    assert result.err.startswith("error: --max-memory 50,000,000 bytes: this merge needs ")
    assert not Path("out").exists()
    monkeypatch.setattr(limits, "machine_memory", lambda: 64_000_000)
    result = mergekit_yaml("r.yml", "out")
    assert result.code == 2
    assert "this machine has 64MB" in result.err
    assert not Path("out").exists()
    needed = result.err.partition("--max-memory ")[2].split()[0]
    monkeypatch.setattr(limits, "_peak", lambda: 0)  # of the tests so far
    assert mergekit_yaml("r.yml", "out", "--max-memory", needed).code == 0


@pytest.mark.parametrize("text", ["lots", "-1", "1.5.2GB", ""])
def test_limits_that_are_no_sizes(tmp_path, text):
    result = mergekit_yaml("r.yml", "out", "--max-memory", text)
    assert result.code == 2
    assert "is not a size" in result.err
