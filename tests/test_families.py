"""Each model family: merged, every tensor accounted for, loaded by transformers without a remark."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch

from mergekit.methods import method_names
from tiny import FAMILIES, config_of, load_checked, merge, outputs_of, recipe_for, tensors_of, unaccounted

Tiny = Callable[..., Path]
ROTATION = list(zip(FAMILIES, cycle(method_names()), strict=False))


def check_merge(tiny: Tiny, family: str, method: str, out: Path) -> None:
    """Merge three models of ``family`` by ``method``: nothing is lost, and the result loads and computes."""
    models = [tiny(family, seed=seed) for seed in range(3)]
    plan = merge(recipe_for(method, models), out)
    assert not unaccounted(plan)
    assert not plan.left_out, "models of one family have no tensor without a place"
    assert not plan.warnings
    mine, theirs = tensors_of(out), tensors_of(models[0])
    assert {n: (t.shape, t.dtype) for n, t in mine.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    same = [name for name, tensor in mine.items() if tensor.numel() > 20 and torch.equal(tensor, theirs[name])]
    assert not same or method == "passthrough", f"equal to the first model's: {same}"
    model = load_checked(out, FAMILIES[family].auto_class)
    assert outputs_of(model, FAMILIES[family].reads).isfinite().all()


@pytest.mark.parametrize(("family", "method"), ROTATION)
def test_family_merges_whole_and_loads(tiny: Tiny, tmp_path: Path, family: str, method: str) -> None:
    check_merge(tiny, family, method, tmp_path / "out")


@pytest.mark.parametrize("method", method_names())
def test_every_method_merges_llama(tiny: Tiny, tmp_path: Path, method: str) -> None:
    check_merge(tiny, "llama", method, tmp_path / "out")


@pytest.mark.matrix
@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_every_method(tiny: Tiny, tmp_path: Path, family: str, method: str) -> None:
    check_merge(tiny, family, method, tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_average_of_a_model_with_itself_is_the_model(tiny: Tiny, tmp_path: Path, family: str) -> None:
    model = tiny(family)
    copy = shutil.copytree(model, tmp_path / "copy")
    merge(recipe_for("linear", [model, copy]), tmp_path / "out")
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    wanted, got = (
        outputs_of(load_checked(folder, FAMILIES[family].auto_class), FAMILIES[family].reads)
        for folder in (model, tmp_path / "out")
    )
    assert torch.equal(wanted, got)
    assert config_of(model) == config_of(tmp_path / "out")
