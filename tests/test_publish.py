"""Publishing: the output folder is wholly the old model, or none, or wholly the new one."""

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
from mergekit.dtypes import BF16
from mergekit.errors import InputChangedError, RunError, UsageError
from mergekit.output.staging import STAGING
from models import family, read_model, write_model

SHAPES = {"embed.weight": (61, 7), **{f"layers.{i}.w": (31, 11) for i in range(3)}, "norm": (17,)}


@pytest.fixture
def recipe(tmp_path):
    models = [{"model": str(f), "parameters": {"weight": 0.5}} for f in family(tmp_path, 2, BF16, SHAPES)]
    return {"merge_method": "linear", "models": models}


class Stop(BaseException):
    """Stands for the moment at which a process is killed."""


def stop_at(patch, number: int) -> list[str]:
    """Make the ``number``-th rename or removal of a file fail, as if the process died just before it."""
    seen: list[str] = []

    def counted(call):
        def run(*args, **more):
            seen.append(str(args[-1]))
            if len(seen) == number:
                raise Stop
            return call(*args, **more)

        return run

    patch.setattr(os, "replace", counted(os.replace))
    patch.setattr("pathlib.Path.unlink", counted(Path.unlink))
    return seen


def is_whole(out, *expected) -> bool:
    """Whether ``out`` holds exactly one of the ``expected`` models, as far as a loader would see."""
    files = {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".safetensors", ".json")}
    return files in expected


def loaded_files(out) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".safetensors", ".json")}


@pytest.mark.parametrize("flag_again", [True, False])
def test_killed_at_every_step_of_replacing_a_sharded_model(tmp_path, monkeypatch, recipe, flag_again):
    old = loaded_files(mergekit.run_merge({**recipe, "dtype": "float32"}, tmp_path / "old", shard_size=700))
    new = loaded_files(mergekit.run_merge(recipe, tmp_path / "new"))
    assert len(old) > len(new)
    for number in range(1, 40):
        out = tmp_path / f"out{number}"
        mergekit.run_merge({**recipe, "dtype": "float32"}, out, shard_size=700)
        with monkeypatch.context() as patch:
            seen = stop_at(patch, number)
            try:
                mergekit.run_merge(recipe, out, overwrite=True)
                assert len(seen) < number
                break
            except Stop:
                pass
        assert not (out / "config.json").exists() or is_whole(out, old, new)
        mergekit.run_merge(recipe, out, overwrite=flag_again)  # it had begun to publish: no need to say it again
        assert is_whole(out, new)
        assert not (out / STAGING).exists()
    else:
        raise AssertionError("publishing never came to its end")


def test_unfinished_work_does_not_take_the_protection_from_an_old_model(tmp_path, monkeypatch, recipe):
    out = mergekit.run_merge(recipe, tmp_path / "out")
    other = {**recipe, "dtype": "float32"}
    with monkeypatch.context() as patch:
        patch.setattr("mergekit.output.staging.Staging.publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mergekit.run_merge(other, out, overwrite=True)
    assert (out / STAGING).exists()
    before = loaded_files(out)
    with pytest.raises(UsageError, match="--overwrite"):
        mergekit.run_merge(other, out)
    assert loaded_files(out) == before
    mergekit.run_merge(other, out, overwrite=True)
    assert loaded_files(out) != before


def test_a_foreign_config_is_gone_before_the_first_shard_appears(tmp_path, monkeypatch, recipe):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"mine": 1}')
    with monkeypatch.context() as patch:
        stop_at(patch, 2)  # the removal of config.json is the first step
        with pytest.raises(Stop):
            mergekit.run_merge(recipe, out)
    assert not (out / "config.json").exists()


def test_a_folder_in_the_way_is_refused_before_anything_is_touched(tmp_path, recipe):
    out = mergekit.run_merge(recipe, tmp_path / "out")
    (out / "README.md").unlink()
    (out / "README.md").mkdir()
    before = loaded_files(out)
    with pytest.raises(UsageError, match=r"README\.md is a folder"):
        mergekit.run_merge({**recipe, "dtype": "float32"}, out, overwrite=True)
    assert loaded_files(out) == before


def test_a_staging_folder_that_is_a_link_is_refused(tmp_path, recipe):
    (tmp_path / "else").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / STAGING).symlink_to(tmp_path / "else")
    with pytest.raises(UsageError, match="not a folder of ours"):
        mergekit.run_merge(recipe, tmp_path / "out")
    assert not any((tmp_path / "else").iterdir())


def test_an_input_that_changes_during_the_merge(tmp_path, recipe):
    def change(plan):
        path = tmp_path / "m1" / "model.safetensors"
        path.write_bytes(path.read_bytes())

    with pytest.raises(InputChangedError, match="changed while it was being merged"):
        mergekit.run_merge(recipe, tmp_path / "out", on_plan=change)
    assert not (tmp_path / "out").exists()
    mergekit.run_merge(recipe, tmp_path / "out")


def test_a_failed_commit_is_never_published(tmp_path, monkeypatch, recipe):
    from mergekit.output.staging import Staging

    settle = Staging.settle

    def faulty(self):
        self._fault = RunError("the disk said no")
        settle(self)

    monkeypatch.setattr(Staging, "settle", faulty)
    with pytest.raises(RunError, match="the disk said no"):
        mergekit.run_merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "dare_ties", "dare_linear"])
def test_empty_tensors(tmp_path, method):
    tensors = {"w": np.ones((3, 5)), "none": np.zeros((0,)), "flat": np.zeros((5, 0, 3))}
    folders = [str(write_model(tmp_path / n, tensors)) for n in "ab"]
    models = [{"model": f, "parameters": {"weight": 1, "density": 0.5}} for f in folders]
    parameters = {"t": 0.5}
    made = {"merge_method": method, "base_model": folders[0], "models": models, "parameters": parameters}
    out = read_model(mergekit.run_merge(made, tmp_path / "out"))
    assert {n: v.shape for n, v in out.items()} == {n: v.shape for n, v in tensors.items()}


def test_one_folder_under_two_names_is_refused(tmp_path, recipe):
    recipe["models"].append({"model": f"{recipe['models'][0]['model']}/", "parameters": {"weight": 1}})
    with pytest.raises(UsageError, match="are the same folder"):
        mergekit.plan(recipe)


@pytest.mark.parametrize("options", [{"seed": -1}, {"threads": 0}, {"shard_size": -5}, {"threads": "2"}])
def test_numbers_that_cannot_be_meant(tmp_path, recipe, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        mergekit.run_merge(recipe, tmp_path / "out", **options)


def test_terminated_like_interrupted(tmp_path):
    shapes = {f"layers.{i}.w": (509, 2003) for i in range(40)}
    models = [{"model": str(f), "parameters": {"weight": 0.5}} for f in family(tmp_path, 2, BF16, shapes)]
    (tmp_path / "r.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    command = [sys.executable, "-m", "mergekit", "merge", str(tmp_path / "r.yml"), str(tmp_path / "out"), "-j", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / STAGING / "journal").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate()
    if process.returncode == 0:
        pytest.skip("the merge was over before the signal came")
    assert process.returncode == 143
    assert "the same command continues" in text
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_a_power_cut_can_not_reorder(tmp_path, monkeypatch, recipe):
    """Data is on the disk before the journal says so; everything is before the name that makes a model of it."""
    names: dict[int, str] = {}
    events: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "write", "unlink")}

    def opened(path, *args, **kwargs):
        descriptor = real["open"](path, *args, **kwargs)
        names[descriptor] = Path(path).name
        return descriptor

    def synced(descriptor):
        events.append(("sync", names.get(descriptor, "a document")))
        real["fsync"](descriptor)

    def written(descriptor, data):
        events.append(("write", names.get(descriptor, "?")))
        return real["write"](descriptor, data)

    def renamed(source, target):
        events.append(("rename", Path(target).name))
        real["replace"](source, target)

    for name, spy in {"open": opened, "fsync": synced, "write": written, "replace": renamed}.items():
        monkeypatch.setattr(os, name, spy)
    mergekit.run_merge(recipe, tmp_path / "out", shard_size=2000)
    monkeypatch.undo()

    shards = [name for kind, name in events if kind == "rename" and name.endswith(".safetensors")]
    assert len(shards) > 1
    first_rename = events.index(("rename", shards[0]))
    commits = [at for at, event in enumerate(events[:first_rename]) if event == ("write", "journal")]
    for shard in shards:  # the journal's last words of tensors come after the last sync of what they are about
        assert ("sync", shard) in events[: commits[-2]]
    # ... and are on the disk, like the word that publishing begins, before a name changes.
    assert ("sync", "journal") in events[commits[-1] : first_rename]
    config = events.index(("rename", "config.json"))
    assert config == max(at for at, (kind, _) in enumerate(events) if kind == "rename")
    assert ("sync", "out") in events[first_rename:config], "the names of the shards are there before config.json is"
    assert ("sync", "out") in events[config:]


def files(folder: Path) -> dict[str, bytes]:
    """The files that don't depend on how the recipe was given."""
    names = ("*.safetensors", "*.index.json", "config.json", "merge_stats.json")
    return {path.name: path.read_bytes() for name in names for path in folder.glob(name)}


def test_killed_at_every_step_of_cleaning_up(tmp_path, recipe):
    """The model is complete: the same command says so and clears the rest; another may not replace it unasked."""
    script = (
        "import os, sys, mergekit\n"
        "real, left = os.unlink, int(sys.argv[3])\n"
        "def unlink(path, *args, **more):\n"
        "    global left\n"
        "    if not os.path.exists('out/config.json'):\n"
        "        return real(path, *args, **more)\n"
        "    if left == 0:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    left -= 1\n"
        "    real(path, *args, **more)\n"
        "os.unlink = unlink\n"
        "mergekit.run_merge(sys.argv[1], sys.argv[2], shard_size=2000)\n"
    )
    mergekit.run_merge(recipe, tmp_path / "whole", shard_size=2000)
    wanted = files(tmp_path / "whole")
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    other = {**recipe, "models": recipe["models"][:1]}
    steps = 0
    while True:
        out = tmp_path / f"at{steps}" / "out"
        out.parent.mkdir()
        command = [sys.executable, "-c", script, str(tmp_path / "r.yml"), "out", str(steps)]
        if subprocess.run(command, cwd=out.parent).returncode == 0:
            break
        assert (out / STAGING).exists()
        with pytest.raises((UsageError, RunError), match=r"already holds weights|unfinished work"):
            mergekit.run_merge(other, out)
        if (out / STAGING).exists():
            mergekit.run_merge(recipe, out, shard_size=2000)
        assert not (out / STAGING).exists()
        assert files(out) == wanted
        steps += 1
    assert steps >= 1


def test_replacing_a_model_leaves_none_of_its_small_files(tmp_path, recipe):
    """A tokenizer of the old model beside the new one would be loaded with it; what people changed or added stays."""
    for model in recipe["models"]:
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            (Path(model["model"]) / name).write_text("{}")
    out = mergekit.run_merge(recipe, tmp_path / "out")
    (out / "chat_template.jinja").write_text("mine")
    (out / "LICENSE").write_text("mine, too")
    mergekit.run_merge(recipe, out, overwrite=True, copy_tokenizer=False)
    assert not (out / "tokenizer_config.json").exists()
    assert (out / "chat_template.jinja").read_text() == "mine"
    assert (out / "LICENSE").read_text() == "mine, too"
