"""What the documentation promises is so: generated pages are current, example recipes run, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tempfile
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


def test_recipes_in_the_pages_are_valid(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    found = 0
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S):
            if "merge_method" in block:
                found += 1
                path = tmp_path / f"{found}.yml"
                path.write_text(block)
                assert mergekit.plan(path).outputs
    assert found >= 2


def test_the_mixture_of_the_walk_through_is_the_example():
    """Its recipe is the file's, and what the console shows is what the command prints, figures aside."""
    page = (ROOT / "docs" / "phi3-moe.md").read_text()
    recipe = (ROOT / "examples/phi3_moe/recipe.yml").read_text()
    assert "\n".join(line for line in recipe.splitlines() if not line.startswith("#")) in page
    block = re.search(r"```console\n(.*?)```", page, re.S)[1]
    *_, command = re.findall(r"^\$ mergekit (.*)$", block, re.M)
    shown = [line for line in block.splitlines() if not line.startswith("$")]
    arguments = [*command.replace("phi3-moe-out", "{out}").split()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [a.format(out=f"{folder}/out") for a in arguments]
        program = [sys.executable, "-m", "mergekit", *arguments]
        done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT)
        example = [sys.executable, "examples/phi3_moe/generate.py", f"{folder}/out", "def main(", "12+30="]
        texts = subprocess.run(example, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert len(texts.splitlines()) == 2
    assert "12+30=" in texts
    figure = re.compile(r"[\d.]+(e-\d+)?|'.*'")
    assert [figure.sub("0", line).split() for line in done.stdout.splitlines()] == [
        figure.sub("0", line).split() for line in shown
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_demo_runs(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "examples/linear.yml"])
    monkeypatch.syspath_prepend(str(ROOT / "models"))
    runpy.run_path(str(ROOT / "examples" / "demo.py"), run_name="__main__")
    printed = capfd.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line and not line.startswith("$")}
    assert {"base", "code", "prose", "calc", "linear"} <= set(rows)
    for domain, expert in enumerate(("code", "prose", "calc")):
        assert float(rows[expert][3 * domain]) < float(rows["base"][3 * domain])
