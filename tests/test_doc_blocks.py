"""What the pages show is what happens: every console block runs, every recipe plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import mergekit
from docs_blocks import blocks, run_page, same
from mergekit.errors import ModelNotFoundError

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SHOWING = [page for page in PAGES if "```console" in page.read_text()]


@pytest.mark.parametrize("page", SHOWING, ids=lambda p: p.stem)
def test_what_the_page_shows_is_printed(page, tmp_path, monkeypatch):
    for name in ("models", "examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    faults, reasons = run_page(page, tmp_path)
    for reason in reasons:
        print(f"{page.name}: not run: {reason}")
    assert not faults, "\n\n".join(faults)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_recipes_on_the_page_plan(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "prompts").symlink_to(ROOT / "examples" / "phi3_moe" / "prompts")
    for number, block in enumerate(blocks(page.read_text())):
        if block.kind != "yaml" or block.not_run is not None:
            continue
        value = yaml.safe_load(block.text)
        path = tmp_path / f"{number}.yml"
        path.write_text(block.text)
        if isinstance(value, dict) and "merge_method" in value:
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
