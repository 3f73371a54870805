"""Compiled kernels are kept between runs; a cache that can't be written never fails a merge."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import mergekit

SCRIPT = "from mergekit.kernels import jit; import numba; print(numba.config.CACHE_DIR)"


def cache_used(**environment: str) -> Path:
    env = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA")} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def test_the_folder_can_be_chosen(tmp_path):
    assert cache_used(MERGEKIT_KERNEL_CACHE=str(tmp_path)).parent == tmp_path
    assert cache_used(XDG_CACHE_HOME=str(tmp_path)).parent == tmp_path / "mergekit" / "kernels"


@pytest.mark.parametrize("kind", ["a file in its place", "a folder that does not exist and can't be made"])
def test_a_cache_that_cannot_be_written_is_replaced_and_removed(tmp_path, kind):
    blocked = tmp_path / "file"
    blocked.write_text("")
    folder = cache_used(MERGEKIT_KERNEL_CACHE=str(blocked if kind.startswith("a file") else blocked / "inside"))
    assert folder.parent == Path(tempfile.gettempdir())
    assert not folder.exists()


def test_warmup_compiles_once_in_each_place(tmp_path):
    """numba's cache goes by the path of the source: another copy of the package has to compile, and says so."""
    command = [sys.executable, "-m", "mergekit", "warmup"]
    subprocess.run(command, check=True, capture_output=True)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "nothing to compile" in again.stderr
    shutil.copytree(Path(mergekit.__file__).parent, tmp_path / "mergekit", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from mergekit.kernels.warmup import FORMS, cold_forms; print(cold_forms() == list(FORMS))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.stdout.strip() == "True", told.stderr
