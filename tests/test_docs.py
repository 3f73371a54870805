"""What the documentation promises is so: generated pages are current, example recipes run, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import mergekit

ROOT = Path(mergekit.__file__).parent.parent
RECIPES = sorted((ROOT / "examples").glob("*.yml"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "models" / "README.md"])


def test_generated_pages_are_current():
    done = subprocess.run([sys.executable, str(ROOT / "docs/generate.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_example_merges_and_loads(recipe, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(ROOT)
    out = mergekit.run_merge(recipe, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.isfinite(model(torch.arange(40)[None]).logits).all()


def test_the_recipe_of_the_walk_through_is_the_example():
    page = (ROOT / "docs" / "phi3-moe.md").read_text()
    recipe = (ROOT / "examples/phi3_moe/recipe.yml").read_text()
    assert "\n".join(line for line in recipe.splitlines() if not line.startswith("#")) in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture
def one_thread():
    """Torch on one thread: two of them wait for each other by spinning where the processors are busy (18 s, or 52)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_demo_runs(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "examples/linear.yml"])
    monkeypatch.syspath_prepend(str(ROOT / "models"))
    runpy.run_path(str(ROOT / "examples" / "demo.py"), run_name="__main__")
    printed = capfd.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line and not line.startswith("$")}
    assert {"base", "code", "prose", "calc", "linear"} <= set(rows)
    for domain, expert in enumerate(("code", "prose", "calc")):
        assert float(rows[expert][3 * domain]) < float(rows["base"][3 * domain])
