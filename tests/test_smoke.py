"""One tiny merge end to end through the command line, in seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import yaml

from models import family, read_model


def test_a_merge_from_the_shell(tmp_path):
    folders = family(tmp_path, 2)
    models = [{"model": str(f), "parameters": {"weight": 0.5}} for f in folders]
    (tmp_path / "r.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "float32"}))
    command = [sys.executable, "-m", "mergekit", "merge", str(tmp_path / "r.yml"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "merge_manifest.json", "merge_stats.json", "mergekit_config.yml",
        "model.safetensors",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    a, b, c = map(read_model, [*folders, tmp_path / "out"])
    assert all(abs(c[n] - (a[n] + b[n]) / 2).max() < 1e-6 for n in a)
