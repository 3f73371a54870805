"""Heads that are tied to the embeddings or not, and vocabularies of different size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mergekit
from mergekit.errors import IncompatibleError
from tiny import (
    FAMILIES,
    average,
    config_of,
    edited,
    is_shared,
    load_checked,
    merge,
    names_of,
    outputs_of,
    recipe_for,
    tensors_of,
    unaccounted,
)

Tiny = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_tied_models_stay_tied(tiny: Tiny, tmp_path: Path) -> None:
    a, b = (tiny("llama", seed=seed, tie_word_embeddings=True) for seed in (0, 1))
    plan = merge(average(a, b), tmp_path / "out")
    assert HEAD not in names_of(tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert is_shared(load_checked(tmp_path / "out"))
    assert not plan.warnings


def test_untied_models_stay_untied(tiny: Tiny, tmp_path: Path) -> None:
    a, b = (tiny("llama", seed=seed) for seed in (0, 1))
    plan = merge(average(a, b), tmp_path / "out")
    torch.testing.assert_close(tensors_of(tmp_path / "out")[HEAD], (tensors_of(a)[HEAD] + tensors_of(b)[HEAD]) / 2)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert not is_shared(load_checked(tmp_path / "out"))
    assert not plan.warnings


@pytest.mark.parametrize("tied_first", [True, False])
@pytest.mark.parametrize(
    ("family", "silent"),
    [
        ("llama", False),
        ("qwen2", False),
        ("gpt2", False),
        ("gpt2", True),
        ("gemma2", False),
        ("gemma2", True),
        ("cohere", False),
    ],
)
def test_tied_with_untied_gives_a_head_of_its_own(
    tiny: Tiny, tmp_path: Path, family: str, silent: bool, tied_first: bool
) -> None:
    tied, untied = tiny(family, tie_word_embeddings=True), tiny(family, seed=1, tie_word_embeddings=False)
    if silent:  # tied by default in this family
        tied = edited(tied, tmp_path / "tied", without=["tie_word_embeddings"])
    models = (tied, untied) if tied_first else (untied, tied)
    plan = merge(average(*models), tmp_path / "out")
    embedding = "transformer.wte.weight" if family == "gpt2" else EMBEDDING
    merged, of_tied, of_untied = (tensors_of(folder) for folder in (tmp_path / "out", tied, untied))
    torch.testing.assert_close(merged[embedding], (of_tied[embedding] + of_untied[embedding]) / 2)
    torch.testing.assert_close(merged[HEAD], (of_tied[embedding] + of_untied[HEAD]) / 2)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert any("untied" in warning for warning in plan.warnings) == tied_first
    assert not unaccounted(plan)
    assert not plan.left_out
    model = load_checked(tmp_path / "out")
    assert not is_shared(model)
    torch.testing.assert_close(model.lm_head.weight, merged[HEAD])


@pytest.mark.parametrize("method", ["slerp", "task_arithmetic", "ties"])
def test_tied_with_untied_by_every_form_of_method(tiny: Tiny, tmp_path: Path, method: str) -> None:
    tied, untied = tiny("llama", tie_word_embeddings=True), tiny("llama", seed=1)
    merge(recipe_for(method, [tied, untied]), tmp_path / "out")
    assert {HEAD, EMBEDDING} <= names_of(tmp_path / "out")
    model = load_checked(tmp_path / "out")
    assert not is_shared(model)
    assert outputs_of(model).isfinite().all()


def test_filters_see_a_tied_head_as_head(tiny: Tiny, tmp_path: Path) -> None:
    tied, untied = tiny("llama", tie_word_embeddings=True), tiny("llama", seed=1)
    recipe = average(tied, untied)
    recipe["parameters"] = {"weight": 1}
    recipe["models"][0]["parameters"] = {"weight": [{"filter": "lm_head", "value": 0}, {"value": 1}]}
    merge(recipe, tmp_path / "out")
    torch.testing.assert_close(tensors_of(tmp_path / "out")[HEAD], tensors_of(untied)[HEAD])


@pytest.mark.parametrize("stored", [(0,), (1,), (0, 1)], ids=str)
def test_stored_copies_of_a_tied_head_do_no_harm(tiny: Tiny, tmp_path: Path, stored: tuple[int, ...]) -> None:
    models = [tiny("llama", seed=seed, tie_word_embeddings=True) for seed in (0, 1)]
    for i in stored:
        copy = {HEAD: tensors_of(models[i])[EMBEDDING].clone()}
        models[i] = edited(models[i], tmp_path / f"stored-{i}", add=copy)
    plan = merge(average(*models), tmp_path / "out")
    assert not unaccounted(plan)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    merged = tensors_of(tmp_path / "out")
    torch.testing.assert_close(merged.get(HEAD, merged[EMBEDDING]), merged[EMBEDDING], rtol=0, atol=0)
    assert is_shared(load_checked(tmp_path / "out"))


@pytest.mark.parametrize("first", ["tied", "untied"])
def test_stack_of_tied_and_untied_has_the_head_of_its_last_slice(tiny: Tiny, tmp_path: Path, first: str) -> None:
    tied, untied = tiny("llama", tie_word_embeddings=True), tiny("llama", seed=1)
    order = (tied, untied) if first == "tied" else (untied, tied)
    slices = [{"sources": [{"model": str(model), "layer_range": [0, 2]}]} for model in order]
    merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    assert torch.equal(merged[EMBEDDING], tensors_of(order[0])[EMBEDDING])
    assert torch.equal(merged[HEAD], tensors_of(order[1])[HEAD if first == "tied" else EMBEDDING])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert not is_shared(load_checked(tmp_path / "out"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert_masked", "llava"])
@pytest.mark.parametrize("small_first", [True, False])
def test_vocabularies_are_cut_to_the_smallest(tiny: Tiny, tmp_path: Path, family: str, small_first: bool) -> None:
    sizes = dict(FAMILIES[family].sizes)
    more = {"text_config": {**sizes["text_config"], "vocab_size": 67}} if family == "llava" else {"vocab_size": 67}
    small, large = tiny(family), tiny(family, seed=1, **more)
    recipe = average(*((small, large) if small_first else (large, small)))
    with pytest.raises(IncompatibleError, match="vocabularies differ in size"):
        mergekit.plan(recipe)
    plan = merge(recipe, tmp_path / "out", unsafe_truncate_embeddings=True)
    merged, of_small, of_large = (tensors_of(folder) for folder in (tmp_path / "out", small, large))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (of_small[name] + of_large[name][: len(of_small[name])]) / 2)
    cut = [name for name in of_small if of_small[name].shape != of_large[name].shape]
    assert cut
    warnings = [warning for warning in plan.warnings if "only the first 61 rows are kept" in warning]
    assert len(warnings) == 1
    assert all(name in warnings[0] for name in cut)
    config = config_of(tmp_path / "out")
    assert config.get("text_config", config)["vocab_size"] == 61
    loaded = load_checked(tmp_path / "out", FAMILIES[family].auto_class)
    assert outputs_of(loaded, FAMILIES[family].reads).isfinite().all()


def test_special_tokens_that_are_cut_are_null(tiny: Tiny, tmp_path: Path) -> None:
    small, large = tiny("llama"), tiny("llama", seed=1, vocab_size=67, pad_token_id=66)
    plan = merge(average(large, small), tmp_path / "out", unsafe_truncate_embeddings=True)
    assert config_of(tmp_path / "out")["pad_token_id"] is None
    assert any("pad_token_id" in warning for warning in plan.warnings)
    load_checked(tmp_path / "out")


def test_other_shapes_are_refused_with_a_table(tiny: Tiny) -> None:
    a, b = tiny("llama"), tiny("llama", seed=1, intermediate_size=41)
    with pytest.raises(IncompatibleError, match=r"(?s)model\.layers\.0\.mlp\.\w+\.weight: shapes differ.*37.*41"):
        mergekit.plan(average(a, b))
