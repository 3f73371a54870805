"""Models on a hub: planned from headers before any weight is downloaded, merged, and merged again offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from hub_server import HubServer
from models import family, read_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return family(tmp_path_factory.mktemp("hub"), 2, shapes={"layers.0.w": (509, 1021), "norm": (17,)})


def run(*command: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mergekit", *command], env=env, capture_output=True, text=True)


def test_plan_then_merge_then_offline(models, tmp_path):
    entries = [{"model": name, "parameters": {"weight": 0.5}} for name in ("org/a", "org/b@main")]
    recipe = tmp_path / "r.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": entries}))
    with HubServer({"org/a": models[0], "org/b": models[1]}) as server:
        env = {**os.environ, **server.environment(tmp_path / "home")}
        done = run("plan", str(recipe), "--json", env=env)
        assert done.returncode == 0, done.stderr
        assert [t["name"] for t in json.loads(done.stdout)["tensors"]] == ["layers.0.w", "norm"]
        assert server.sent("resolve") < 20_000  # headers and configs; the weights are 2 MB each
        done = run("merge", str(recipe), str(tmp_path / "out"), env=env)
        assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["org/a", "org/b"]
    a, b, merged = map(read_model, [*models, tmp_path / "out"])
    assert all(np.allclose(merged[n], (a[n] + b[n]) / 2, atol=1e-6) for n in a)

    offline = {**env, "HF_HUB_OFFLINE": "1"}  # the server is gone as well
    done = run("plan", str(recipe), env=offline)
    assert done.returncode == 0, done.stderr
    done = run("merge", str(recipe), str(tmp_path / "again"), env=offline)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
