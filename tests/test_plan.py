"""The plan is pure data, reads no weight, and says exactly what will stand where."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import yaml

import mergekit
from mergekit.checkpoint.header import read_header
from mergekit.dtypes import BF16, F32
from mergekit.planning.describe import describe, groups
from mergekit.planning.expression import Apply, Read
from models import family, read_model, write_model

SHAPES = {"embed.weight": (61, 7), **{f"layers.{i}.w": (31, 11) for i in range(5)}, "norm": (17,)}


def recipe(folders, method="task_arithmetic", **parameters):
    models = [{"model": str(f), "parameters": {"weight": [0.0, 1.0]}} for f in folders[1:]]
    return {"merge_method": method, "base_model": str(folders[0]), "models": models, "parameters": parameters}


@pytest.fixture
def folders(tmp_path):
    return family(tmp_path, 3, BF16, SHAPES)


def test_a_plan_is_hashable_picklable_and_the_same_again(folders):
    plan = mergekit.plan(recipe(folders))
    assert pickle.loads(pickle.dumps(plan)) == plan == mergekit.plan(recipe(folders))
    assert hash(plan) == hash(mergekit.plan(recipe(folders)))


def test_the_digest_follows_what_decides_the_bytes(folders):
    digests = [
        mergekit.plan(recipe(folders)).digest(),
        mergekit.plan(recipe(folders, **{"lambda": 0.5})).digest(),
        mergekit.plan(recipe(folders, "dare_linear", density=0.5)).digest(),
        mergekit.plan(recipe(folders, "dare_linear", density=0.5) | {"seed": 3}).digest(),
        mergekit.plan(recipe(folders) | {"dtype": "float32"}).digest(),
    ]
    assert len(set(digests)) == len(digests)


def test_planning_reads_no_weight(folders, monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(os, "preadv", refuse)
    for folder in folders:  # the header stays, every weight becomes NaN: nobody must notice
        path = folder / "model.safetensors"
        infos, _ = read_header(path)
        first = min(i.offset for i in infos.values())
        raw = path.read_bytes()
        path.write_bytes(raw[:first] + b"\xff" * (len(raw) - first))
    assert len(mergekit.plan(recipe(folders)).outputs) == len(SHAPES)


@pytest.mark.parametrize("shard_size", [0, 700, 2000])
def test_files_are_as_planned(folders, tmp_path, shard_size):
    options = mergekit.RunOptions(shard_size=shard_size)
    plan = mergekit.plan(recipe(folders), options)
    out = mergekit.run_merge(recipe(folders), tmp_path / "out", options)
    found = {}
    for shard in plan.shards:
        assert (out / shard.name).stat().st_size == shard.size
        found.update({n: (shard.name, i.offset, i.shape) for n, i in read_header(out / shard.name)[0].items()})
    assert found == {o.name: (o.file, o.offset, o.shape) for o in plan.outputs}
    assert all(shard_size == 0 or len(group) == 1 or size <= shard_size for group, size in _sizes(plan))
    if len(plan.shards) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {o.name: o.file for o in plan.outputs}
        assert index["metadata"]["total_size"] == sum(o.nbytes for o in plan.outputs)


def _sizes(plan):
    for shard in plan.shards:
        group = [o for o in plan.outputs if o.file == shard.name]
        yield group, sum(o.nbytes for o in group)


def test_gradients_run_over_the_layers(folders):
    weights = {
        o.name: dict(o.expression.parameters)["weight"][0]
        for o in mergekit.plan(recipe(folders)).outputs
        if isinstance(o.expression, Apply)
    }
    assert [weights[f"layers.{i}.w"] for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert weights["embed.weight"] == weights["norm"] == 0


def test_an_input_with_the_whole_weight_is_a_copy(folders):
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, (0, 2, 0), strict=True)]
    plan = mergekit.plan({"merge_method": "linear", "models": models})
    assert all(isinstance(o.expression, Read) and o.expression.source == 1 for o in plan.outputs)


def test_groups_and_description_account_for_everything(folders):
    plan = mergekit.plan(recipe(folders))
    assert [len(g.tensors) for g in groups(plan)] == [1, 5, 1]
    record = json.loads(json.dumps(describe(plan)))
    assert sum(t["bytes"] for t in record["tensors"]) == sum(g.bytes_written for g in groups(plan))
    used = {(i["model"], i["tensor"]) for t in record["tensors"] for i in t["inputs"]}
    left = {(x["model"], x["tensor"]) for x in record["left_out"]}
    assert used | left == {(str(f), name) for f in folders for name in SHAPES}
    assert not used & left


def test_tensors_that_only_one_model_has(tmp_path):
    base = write_model(tmp_path / "base", {"w": np.ones((3, 5)), "only_base": np.ones(2)})
    tuned = write_model(tmp_path / "tuned", {"w": np.ones((3, 5)) * 3, "only_tuned": np.ones(7)})
    plan = mergekit.plan(recipe([base, tuned], **{"lambda": 1.0}))
    assert {o.name for o in plan.outputs} == {"w", "only_base"}
    assert [(s, n) for s, n, _ in plan.left_out] == [(0, "only_tuned")]
    assert any("only_tuned" in w for w in plan.warnings)
    assert any("only_base" in w for w in plan.warnings)
    out = read_model(mergekit.run_merge(recipe([base, tuned]), tmp_path / "out"))
    assert (out["only_base"] == 1).all()


def test_disagreements_are_warned_of(tmp_path):
    tensors = {"w": np.ones((3, 5))}
    a = write_model(tmp_path / "a", tensors, rope_theta=10000.0, max_position_embeddings=4096, eos_token_id=2)
    b = write_model(tmp_path / "b", tensors, rope_theta=500000.0, max_position_embeddings=8192, eos_token_id=[2, 7])
    (a / "chat_template.jinja").write_text("{{ a }}")
    (b / "tokenizer_config.json").write_text('{"chat_template": "{{ b }}"}')
    warnings = "\n".join(mergekit.plan(recipe([a, b])).warnings)
    for fact in ("rope theta", "context length", "end-of-text token", "chat template"):
        assert fact in warnings
    assert "a's is taken" in warnings


def peak_memory(path) -> int:
    script = (
        "import sys, mergekit\n"
        "mergekit.run_merge(sys.argv[1], sys.argv[2], threads=2)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    out = path.parent / (path.stem + "-out")
    done = subprocess.run([sys.executable, "-c", script, str(path), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_memory_does_not_grow_with_a_tensor(tmp_path, method):
    sizes = {"small": {"w": (64, 1024)}, "large": {"w": (6144, 1024)}}
    peaks = {}
    for name, shapes in sizes.items():
        made = recipe(family(tmp_path / name, 3, F32, shapes), method, density=0.5)
        if method == "linear":
            del made["base_model"]
            made["models"] = [{**m, "parameters": {"weight": 0.5}} for m in made["models"]]
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(made))
        peaks[name] = peak_memory(tmp_path / f"{name}.yml")
    assert peaks["large"] < peaks["small"] + 20_000  # kilobytes; the tensor has 24,576, and there are three
    assert peaks["large"] < 400_000


def test_the_plan_names_code_that_comes_along(folders, tmp_path):
    (folders[0] / "modeling_test.py").write_text("raise SystemExit('ran')\n")
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
    wanted = {"merge_method": "linear", "models": models}
    assert any("brings code (modeling_test.py): it is copied and not run" in n for n in mergekit.plan(wanted).notes)
    mergekit.run_merge(wanted, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_test.py").is_file()
