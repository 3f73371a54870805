"""``mergekit verify`` and ``mergekit reproduce``: what a merge leaves behind to be checked, and the checking."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import command
import mergekit
from mergekit.api.reproduce import reproduce_model
from mergekit.api.verify import verify_model
from mergekit.dtypes import BF16, F32, DType
from mergekit.errors import CheckpointError, MergekitError
from mergekit.output.manifest import MANIFEST, read_manifest
from mergekit.output.staging import STAGING
from models import family

SHAPES = {
    "model.embed_tokens.weight": (64, 16),
    "model.layers.0.mlp.up_proj.weight": (32, 16),
    "model.layers.1.mlp.up_proj.weight": (32, 16),
    "model.norm.weight": (16,),
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 64}


def run(*args: str) -> tuple[int, str, str]:
    done = command.mergekit(*args)
    return done.code, done.out, done.err


def models(root: Path, dtype: DType = BF16) -> list[Path]:
    folders = family(root, 3, dtype, SHAPES)
    for folder in folders:
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return folders


def recipe(folders: list[Path], **more: object) -> dict[str, object]:
    models = [{"model": str(f), "parameters": {"weight": 0.5, "density": 0.6}} for f in folders[1:]]
    return {"merge_method": "dare_ties", "base_model": str(folders[0]), "models": models, "dtype": "bfloat16", **more}


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """A merge of three models into several shards, in ``out``."""
    monkeypatch.chdir(tmp_path)
    folders = models(tmp_path)
    Path("r.yml").write_text(yaml.safe_dump(recipe(folders)))
    mergekit.run_merge("r.yml", "out", seed=7, shard_size=3000, threads=2)
    return tmp_path / "out"


def test_a_merge_is_sound_and_can_be_made_again(merged):
    code, said, _ = run("verify", "out")
    assert code == 0, said
    assert "every tensor has the checksum of merge_manifest.json" in said
    assert said.endswith("out is sound\n")
    code, said, _ = run("reproduce", "out", "-j", "3")
    assert code == 0, said
    assert "all 4 tensors and 2 small files come out the same" in said


def test_the_manifest_says_what_was_done(merged):
    manifest = read_manifest(merged)
    assert manifest is not None
    assert manifest.seed == 7
    assert manifest.options["shard_size"] == 3000
    assert sorted(entry["model"] for entry in manifest.inputs) == ["m0", "m1", "m2"]
    assert list(manifest.tensors) == sorted(SHAPES)
    assert {record.file for record in manifest.tensors.values()} == {p.name for p in merged.glob("*.safetensors")}
    text = (merged / MANIFEST).read_text()
    assert str(merged.parent) not in text
    assert "README.md" not in manifest.files


def test_the_manifest_does_not_depend_on_threads(merged):
    before = (merged / MANIFEST).read_bytes()
    mergekit.run_merge("r.yml", "again", seed=7, shard_size=3000, threads=1)
    assert Path("again", MANIFEST).read_bytes() == before


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def poison(folder: Path) -> None:
    raw = bytearray(shards(folder)[0].read_bytes())
    raw[-2:] = np.float32(np.nan).tobytes()[2:]
    shards(folder)[0].write_bytes(raw)


def rewrite(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda out: flip(shards(out)[1]), "1 tensors changed since they were written: model."),
    "not a number": (poison, "1 tensors hold NaN or infinity"),
    "a small file": (lambda out: rewrite(out, "llama", "mistral"), "1 files changed since the merge: config.json"),
    "no recipe": (lambda out: (out / "mergekit_config.yml").unlink(), "1 files are missing: mergekit_config.yml"),
    "unfinished work": (lambda out: (out / STAGING).mkdir(), "holds the work of a merge that did not end"),
    "fewer rows": (lambda out: rewrite(out, "64", "60"), "says vocab_size 60, but the embeddings have 64 rows"),
    "more layers": (lambda out: rewrite(out, 'layers": 2', 'layers": 9'), "config.json says 9 layers, but no stack"),
    "weights that go before": (
        lambda out: (out / "model.safetensors").write_bytes((out.parent / "m1/model.safetensors").read_bytes()),
        "weights that are no part of it, which other programs may load instead: model.safetensors",
    ),
    "no config": (lambda out: (out / "config.json").unlink(), "config.json is missing or empty"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found(merged, case):
    damage, expected = DAMAGES[case]
    damage(merged)
    result = verify_model(merged)
    assert any(expected in line for line in result.faults + result.lines), result
    assert result.faults
    code, said, _ = run("verify", "out", "--quiet")
    assert code == 1
    assert all(line.startswith("fault: ") for line in said.splitlines())


def test_files_that_cannot_be_read_are_errors(merged):
    shards(merged)[0].write_bytes(shards(merged)[0].read_bytes()[:-1])
    code, _, said = run("verify", "out")
    assert code == 1
    assert said.startswith("error: ")
    assert run("verify", "nowhere")[0] == 2


def test_models_of_others_are_checked_without_checksums(merged):
    result = verify_model(merged.parent / "m0")
    assert not result.faults
    assert any("there are no checksums to compare" in line for line in result.lines)


def test_digests_are_those_of_other_programs(merged):
    lines = verify_model(merged, sha256=True).lines
    for path in shards(merged):
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in lines


def test_reproducing_another_result_says_which_tensors(merged):
    """The weights of an input were changed in place: same size, same header."""
    path = next((merged.parent / "m1").glob("*.safetensors"))
    flip(path, -20)
    code, said, _ = run("reproduce", "out")
    assert code == 1
    assert "fault: 1 of 4 tensors come out different: " in said


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another input": (lambda out: models(out.parent, F32), "has other weight files than it had"),
    "an edited recipe": (lambda out: (out / "mergekit_config.yml").write_text("x: 1\n"), "is not the recipe that"),
    "no recipe": (lambda out: (out / "mergekit_config.yml").unlink(), "the recipe that it was made from"),
    "no manifest": (lambda out: (out / MANIFEST).unlink(), "has no merge_manifest.json"),
    "no model": (lambda out: shutil.rmtree(out.parent / "m2"), "m2"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_cannot_be_reproduced(merged, case):
    change, expected = CHANGES[case]
    change(merged)
    code, out, err = run("reproduce", "out")
    assert code in (1, 2)
    assert expected in out + err
    assert (out + err).count("\n") <= 3


WRONG: dict[str, object] = {
    "format": 2,
    "mergekit": 3,
    "recipe_name": "../x",
    "seed": True,
    "files": {"/etc/passwd": ""},
    "tensors": {"a": [1]},
    "inputs": ["m1"],
    "options": None,
}


@pytest.mark.parametrize("key", WRONG)
def test_hostile_manifests(merged, key):
    record = json.loads((merged / MANIFEST).read_text())
    for damaged in ({**record, key: WRONG[key]}, {k: v for k, v in record.items() if k != key}):
        (merged / MANIFEST).write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_manifest(merged)
        assert run("reproduce", "out")[0] == 1


@pytest.mark.parametrize("text", ["[]", "{}", "not json", "[" * 100_000, "\x00" * 100])
def test_manifests_that_are_something_else(merged, text):
    (merged / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(merged)


def test_hostile_options_are_refused(merged):
    record = json.loads((merged / MANIFEST).read_text())
    record["options"]["shard_size"] = "many"
    (merged / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(MergekitError, match="options"):
        reproduce_model(merged)


def test_a_mixture_can_be_made_again(tmp_path, monkeypatch):
    """Its routers, too: here of random rows, which have their seed."""
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    experts = [{"source_model": f"models/{name}"} for name in ("code", "prose")]
    config = {"base_model": "models/base", "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
    (tmp_path / "moe.yml").write_text(yaml.safe_dump(config))
    out = str(tmp_path / "out")
    code, _, said = run("moe", str(tmp_path / "moe.yml"), out, "--no-verify")
    assert code == 0, said
    assert run("verify", out)[0] == 0
    code, said, err = run("reproduce", out)
    assert code == 0, said + err
    assert "come out the same" in said
