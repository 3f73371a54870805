"""Folders with any name, links of every kind, inputs that nobody may write: what is there before is there after."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from pathlib import Path

import pytest
import yaml

from command import mergekit, mergekit_yaml
from mergekit.dtypes import F32
from models import family, read_model


def recipe(folders: list[Path | str], **more: object) -> str:
    models = [{"model": str(f), "parameters": {"weight": 0.5}} for f in folders]
    return yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "float32", **more}, allow_unicode=True)


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Digest, time of change and mode of every file below a folder."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
            path.stat().st_mode,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


NAMES = [
    "with spaces", "it's", 'a "quote"', "größe-模型-🙂", "#hash", "100%", "a,b;c", "$HOME", "~", "-dash", "a:b", "[x]",
    "{y}",
    "*", "semi;rm -rf x", "trailing.", "x" * 200, "a\tb", "back\\slash", "&", "e\u0301",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_any_name(tmp_path, name):
    folders = family(tmp_path / name, 2, F32)
    before = state(tmp_path)
    Path("r.yml").write_text(recipe(folders), encoding="utf-8")
    out = Path("out", name)
    result = mergekit_yaml("r.yml", f"./{out}", "--quiet")
    assert result.code == 0, result.err
    assert set(read_model(out)) == set(read_model(folders[0]))
    after = state(tmp_path)
    assert {path: after[path] for path in before} == before
    card = (out / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (out / "merge_manifest.json").read_text(encoding="utf-8")
    assert mergekit("verify", str(out.resolve())).code == 0
    assert mergekit("reproduce", str(out.resolve())).code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="names of other systems are text")
def test_an_output_folder_whose_name_is_no_text(tmp_path):
    Path("r.yml").write_text(recipe(family(tmp_path / "m", 2, F32)))
    out = os.fsdecode(b"out\xff")
    result = mergekit_yaml("r.yml", out)
    assert result.code == 0, result.err
    assert mergekit("verify", out).code == 0


def test_a_path_that_is_too_long_is_one_line():
    Path("r.yml").write_text(recipe(["x" * 300, "y" * 5000]))
    result = mergekit_yaml("r.yml", "z" * 300)
    assert result.code in (1, 2)
    assert len(result.lines("error")) == 1
    family(Path("m"), 2, F32)
    Path("r.yml").write_text(recipe(["m/m0", "m/m1"]))
    result = mergekit_yaml("r.yml", "z" * 300)
    assert result.code in (1, 2)
    assert "File name too long" in result.err


@pytest.mark.parametrize("where", ["m", "./m", "../{here}/m", "m/../m", "m/", "{cwd}/m", "m/./"])
def test_local_paths_need_no_network(tmp_path, monkeypatch, where):
    folders = family(tmp_path / "m", 2, F32)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    place = where.format(here=tmp_path.name, cwd=tmp_path)
    Path("r.yml").write_text(recipe([f"{place.rstrip('/')}/{f.name}" for f in folders]))
    result = mergekit_yaml("r.yml", "out")
    assert result.code == 0, result.err


@pytest.mark.parametrize("where", ["./missing/m", "../missing", "/missing/m", "~/missing", "m/missing/deep"])
def test_a_local_path_that_is_not_there_is_not_asked_for_on_the_hub(monkeypatch, where):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    Path("r.yml").write_text(recipe([where, where]))
    result = mergekit_yaml("r.yml", "out")
    assert result.code == 2
    assert len(result.lines("error")) == 1


def test_inputs_that_nobody_may_write(tmp_path):
    folders = family(tmp_path / "m", 2, F32)
    for folder in folders:
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
    before = state(tmp_path / "m")
    Path("r.yml").write_text(recipe(folders))
    result = mergekit_yaml("r.yml", "out")
    assert result.code == 0, result.err
    assert state(tmp_path / "m") == before
    assert os.access("out/config.json", os.W_OK)
    for folder in folders:
        folder.chmod(0o755)


def test_inputs_that_are_links_into_a_cache(tmp_path):
    """As the cache of the hub lays them out."""
    folders = family(tmp_path / "m", 2, F32)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, folder in enumerate(folders):
        for path in list(folder.iterdir()):
            path.rename(blobs / f"{number}-{path.name}")
            path.symlink_to(Path("../../blobs") / f"{number}-{path.name}")
    before = state(blobs)
    Path("r.yml").write_text(recipe(folders))
    assert mergekit_yaml("r.yml", "out").code == 0
    assert not any(path.is_symlink() for path in Path("out").iterdir())
    assert state(blobs) == before


@pytest.mark.parametrize("kind", ["the folder", "a link to it", "a link to its parent", "its real name"])
def test_the_output_is_an_input_under_another_name(tmp_path, kind):
    folders = family(tmp_path / "m", 2, F32)
    before = state(tmp_path / "m")
    Path("one").symlink_to(folders[0])
    Path("parent").symlink_to(tmp_path / "m")
    Path("r.yml").write_text(recipe([Path("one") if kind == "its real name" else folders[0], folders[1]]))
    out = {"the folder": str(folders[0]), "a link to it": "one", "a link to its parent": "parent/m0"}.get(
        kind, folders[0]
    )
    result = mergekit_yaml("r.yml", str(out), "--overwrite")
    assert result.code == 2
    assert "is also an input" in result.err
    assert state(tmp_path / "m") == before


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_weights_of_the_old_output_are_an_inputs_own_file(tmp_path, link):
    """--overwrite replaces the name in the output, never the file that it leads to."""
    folders = family(tmp_path / "m", 2, F32)
    before = state(tmp_path / "m")
    Path("out").mkdir()
    for name in ("model.safetensors", "config.json"):
        if link == "hard":
            os.link(folders[0] / name, Path("out", name))
        else:
            Path("out", name).symlink_to(folders[0] / name)
    Path("r.yml").write_text(recipe(folders))
    assert mergekit_yaml("r.yml", "out").code == 2
    result = mergekit_yaml("r.yml", "out", "--overwrite")
    assert result.code == 0, result.err
    assert state(tmp_path / "m") == before
    assert not Path("out/model.safetensors").is_symlink()
    assert not Path("out/model.safetensors").samefile(folders[0] / "model.safetensors")


def test_an_output_folder_that_is_a_link_is_written_where_it_leads(tmp_path):
    Path("elsewhere").mkdir()
    Path("out").symlink_to("elsewhere")
    Path("r.yml").write_text(recipe(family(tmp_path / "m", 2, F32)))
    assert mergekit_yaml("r.yml", "out").code == 0
    assert Path("elsewhere/config.json").is_file()
    assert Path("out").is_symlink()


def test_a_dangling_link_as_output_is_refused(tmp_path):
    Path("out").symlink_to("nowhere")
    Path("r.yml").write_text(recipe(family(tmp_path / "m", 2, F32)))
    result = mergekit_yaml("r.yml", "out")
    assert result.code == 2
    assert len(result.lines("error")) == 1
    assert not Path("nowhere").exists()
