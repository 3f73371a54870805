"""What the pages show is what happens: every console block runs, every recipe plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import mergekit
from command import warm_up
from docs_blocks import blocks, indented_commands, run_command, run_page, same
from mergekit.errors import ModelNotFoundError
from mergekit.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]
SHOWING = [page for page in PAGES if "```console" in page.read_text()]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder like the root of the repository, to run commands in."""
    for name in ("models", "examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    warm_up()
    return tmp_path


@pytest.mark.parametrize("page", SHOWING, ids=lambda p: p.stem)
def test_what_the_page_shows_is_printed(page, desk, record_property):
    faults, reasons = run_page(page, desk)
    for reason in reasons:
        assert reason, f"{page.name}: a block is not run, and the page doesn't say why"
        record_property("not run", f"{page.name}: {reason}")
    assert not faults, "\n\n".join(faults)


ELSEWHERE = {
    "git clone <this repository> && cd mergekit": "it would clone what this is",
    "make demo": "test_docs.py runs the demo, without setting up",
    "mergekit new": "it asks; tests/test_new.py answers",
}
"""Commands of the README that are not run for it."""


def test_the_commands_of_the_readme_work(desk, record_property):
    (recipe,) = (block.text for block in blocks(README.read_text()) if block.kind == "yaml")
    (desk / "recipe.yml").write_text(recipe)
    shown = [
        line for page in SHOWING for b in blocks(page.read_text()) if b.kind == "console" for line, _ in b.commands()
    ]
    for line in indented_commands(README.read_text()):
        if line in ELSEWHERE:
            record_property("not run", f"README.md: {ELSEWHERE[line]}")
        elif line not in shown:
            code, printed = run_command(line, desk)
            assert code == 0, f"$ {line}\n{printed}"


def test_pages_show_commands_in_console_blocks():
    found = {page.name: indented_commands(page.read_text()) for page in PAGES if page != README}
    assert not any(found.values()), found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipes_on_the_page_plan(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "prompts").symlink_to(ROOT / "examples" / "phi3_moe" / "prompts")
    for number, block in enumerate(blocks(page.read_text())):
        if block.kind != "yaml" or block.not_run is not None:
            continue
        value = yaml.safe_load(block.text)
        path = tmp_path / f"{number}.yml"
        path.write_text(block.text)
        if isinstance(value, dict) and ("merge_method" in value or "slices" in value):
            named = load_recipe(path).config.referenced_models()
            if not all(
                model.model.path.startswith("org/") for model in named
            ):  # org/ is nobody's: read, but not planned
                assert mergekit.plan(path).outputs
        elif isinstance(value, dict) and "experts" in value:
            from mergekit.api import plan_moe

            assert plan_moe(path).plan.outputs


def test_the_rule():
    assert same("a 10.3 %  x\n", "a 10.4 % x\n")
    assert not same("a 10.3 %\n", "a 12.3 %\n")
    assert same("wrote out in 0.6 s\n", "wrote out in 9.1 s\n")
    assert not same("a\nb\n", "a\n")
    assert same("a\n...\nc\n", "a\nb\nd\nc\n")
    assert same("a\n...\n", "a\nb\n")
    assert not same("b\n...\n", "a\nb\n")
    assert same("sha 0123456789abcdef\n", "sha fedcba9876543210\n")
    assert not same("one\n", "two\n")


def test_models_that_do_not_exist_are_no_excuse():
    with pytest.raises(ModelNotFoundError):
        mergekit.plan({"merge_method": "passthrough", "models": [{"model": "./none"}]})


def test_a_command_fails_where_an_error_is_shown_and_nowhere_else(tmp_path):
    page = tmp_path / "page.md"
    commands = ("mergekit plan none.yml\n...", "echo a  # of two\na", "exit 3", "echo error: b\nerror: b")
    page.write_text("```console\n" + "".join(f"$ {command}\n" for command in commands) + "```\n")
    faults, _ = run_page(page, tmp_path)
    assert [fault.split("\n")[1] for fault in faults] == ["ends with 2", "ends with 3", "ends with 0"]
    page.write_text("```console\n$ echo error: b; exit 2\nerror: b\n```\n")
    assert run_page(page, tmp_path) == ([], [])


def test_indented_commands_are_found():
    assert indented_commands("a\n\n    mergekit plan r.yml  # look\n    tree/  a folder\n\nb\n") == [
        "mergekit plan r.yml"
    ]
