"""Where pages may be written, and that any name can stand in them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import command
import mergekit
from files import write_model
from mergekit import api
from mergekit.api import pages
from mergekit.errors import RunError, UsageError

pytest.importorskip("altair", reason="draws charts")

MINE = f"<!doctype html>\n<meta charset='utf-8'>\n{pages._MARK.decode()}1'>\n"


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write_model(Path(name), seed)
    Path("r.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n")


def commands(target: str) -> list[list[str]]:
    return [["diff", "a", "b", "--html", target], ["plan", "r.yml", "--html", target], ["report", "out", "-o", target]]


@pytest.mark.parametrize("target", ["a/model.safetensors", "a/config.json", "r.yml", "a", "none/p.html"])
def test_nothing_but_a_page_is_replaced_and_no_weight_is_read_before(target, monkeypatch):
    mergekit.run_merge("r.yml", "out")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    monkeypatch.setattr("mergekit.api.compare.compare_pairing", lambda *a, **k: pytest.fail("the weights were read"))
    for arguments in commands(target):
        done = command.mergekit(*arguments)
        command.assert_refused(done, 2, target, "name")
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_a_page_replaces_a_page_also_behind_a_link():
    mergekit.run_merge("r.yml", "out")
    Path("pages").mkdir()
    for number, arguments in enumerate(commands("link.html")):
        Path("pages/p.html").write_text(MINE if number else "")
        Path("link.html").unlink(missing_ok=True)
        os.symlink("pages/p.html", "link.html")
        done = command.mergekit(*arguments)
        assert done.code == 0, done
        assert Path("link.html").is_symlink()
        text = Path("pages/p.html").read_text()
        assert "</html>" in text
        assert pages._MARK.decode() in text[: pages._HEAD]
    assert sorted(path.name for path in Path("pages").iterdir()) == ["p.html"]


def test_devices_are_written_to():
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    pages.write_page(Path("pipe"), "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_a_page_that_can_not_be_written_whole_leaves_the_old_one(monkeypatch):
    Path("p.html").write_text(MINE)

    def full(path, content):
        Path.open(path, "wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match=r"cannot write p\.html: No space left on device"):
        pages.write_page(Path("p.html"), "text")
    assert Path("p.html").read_text() == MINE
    assert not [path for path in Path().iterdir() if path.name.endswith(".part")]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_where_nothing_may_be_written():
    Path("closed").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="may not be written"):
        pages.check_page(Path("closed/p.html"))


@pytest.mark.parametrize("name", ["b\x1b[31mred", "b\u2028c", "b\ufffe", os.fsdecode(b"b\x80c")])
def test_any_name_can_stand_in_a_page(name):
    """Control characters, which end the program that draws charts; what is no character; what is no text."""
    write_model(Path(name), 1)
    api.write_comparison(api.diff("a", name), Path("p.html"))
    spans = [("a", [0, 2]), (name, [1, 3])]
    slices = [{"sources": [{"model": model, "layer_range": span}]} for model, span in spans]
    plan = mergekit.plan({"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"})
    api.report_plan(plan, Path("q.html"), "q")
    for path in ("p.html", "q.html"):
        assert Path(path).read_text("utf-8").rstrip().endswith("</html>")
