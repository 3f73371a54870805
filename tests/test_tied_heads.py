"""Heads tied to the embeddings or not, prefixes that come and go, vocabularies of different size, shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit
from mergekit.errors import IncompatibleError
from tiny import (
    FAMILIES,
    config_of,
    edited,
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


def average(*models: Path, base: Path | None = None) -> dict[str, Any]:
    """A plain average; ``base`` gives config and names without being counted twice."""
    record: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"weight": 1},
    }
    return record if base is None else {**record, "base_model": str(base)}


def is_shared(model: Any) -> bool:
    """Whether a loaded model computes its logits with its embeddings."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- tied heads


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
    [("llama", False), ("qwen2", False), ("gpt2", False), ("gpt2", True), ("gemma2", False), ("gemma2", True)],
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
    merge(recipe_for(method, [tied, untied, untied][:2]), tmp_path / "out")
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


# --- prefixes


def without_prefix(name: str) -> str:
    return name.removeprefix("transformer.")


@pytest.mark.parametrize("bare_first", [True, False])
@pytest.mark.parametrize("untied", [False, True])
def test_gpt2_saved_with_and_without_its_prefix(tiny: Tiny, tmp_path: Path, bare_first: bool, untied: bool) -> None:
    """The files of the original GPT-2 have no prefix, those of its fine-tunes have one."""
    full = tiny("gpt2", tie_word_embeddings=not untied)
    bare = edited(tiny("gpt2", seed=1), tmp_path / "bare", rename=without_prefix)
    models = (bare, full) if bare_first else (full, bare)
    plan = merge(average(*models), tmp_path / "out")
    assert not unaccounted(plan)
    assert not plan.left_out
    merged, of_full, of_bare = (tensors_of(folder) for folder in (tmp_path / "out", full, bare))
    names = set(of_bare if bare_first else of_full) | ({HEAD} if untied else set())
    assert set(merged) == names
    for name, tensor in of_bare.items():
        mine = merged[name if bare_first else f"transformer.{name}"]
        torch.testing.assert_close(mine, (tensor + of_full[f"transformer.{name}"]) / 2)
    if untied:
        torch.testing.assert_close(merged[HEAD], (of_full[HEAD] + of_bare["wte.weight"]) / 2)
    assert is_shared(load_checked(tmp_path / "out")) is not untied


@pytest.mark.parametrize("bare_first", [True, False])
def test_bare_model_with_a_model_with_a_head(tiny: Tiny, tmp_path: Path, bare_first: bool) -> None:
    bare, masked = tiny("bert"), tiny("bert_masked", seed=1)
    models, auto = ((bare, masked), "AutoModel") if bare_first else ((masked, bare), "AutoModelForMaskedLM")
    with pytest.raises(IncompatibleError, match="pass --allow-crimes"):
        mergekit.plan(average(*models))
    plan = merge(average(*models), tmp_path / "out", allow_crimes=True)
    assert not unaccounted(plan)
    merged, of_bare, of_masked = (tensors_of(folder) for folder in (tmp_path / "out", bare, masked))
    assert set(merged) == set(of_bare if bare_first else of_masked)
    shared = [name for name in of_bare if f"bert.{name}" in of_masked]
    assert len(shared) == len(of_bare) - 2, "all but the pooler"
    for name in shared:
        mine = merged[name if bare_first else f"bert.{name}"]
        torch.testing.assert_close(mine, (of_bare[name] + of_masked[f"bert.{name}"]) / 2)
    alone = [name for name in of_bare if "pooler" in name] if bare_first else [n for n in of_masked if "cls." in n]
    assert all(torch.equal(merged[name], (of_bare if bare_first else of_masked)[name]) for name in alone)
    left = {name for _, name, _ in plan.left_out}
    assert left == (
        {n for n in of_masked if "cls." in n} if bare_first else {"pooler.dense.weight", "pooler.dense.bias"}
    )
    assert any("left out" in warning for warning in plan.warnings)
    assert outputs_of(load_checked(tmp_path / "out", auto)).isfinite().all()


def test_bare_model_gets_no_head_from_another(tiny: Tiny, tmp_path: Path) -> None:
    bare = tiny("gpt2", model_class="GPT2Model")
    full = tiny("gpt2", seed=1, tie_word_embeddings=False)
    plan = merge(average(bare, full), tmp_path / "out", allow_crimes=True)
    assert names_of(tmp_path / "out") == names_of(bare)
    assert [(source, name) for source, name, _ in plan.left_out] == [(1, HEAD)]
    load_checked(tmp_path / "out", "AutoModel")


OLD_BUFFERS = {
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(5.0)},
    "gpt_neox": {
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.arange(5.0),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 47, 47).tril().bool(),
    },
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 47, 47).tril().to(torch.uint8),
    },
    "bert_masked": {"bert.embeddings.position_ids": torch.arange(47)[None]},
}


@pytest.mark.parametrize("old_first", [True, False])
@pytest.mark.parametrize("family", OLD_BUFFERS)
def test_buffers_of_older_files_are_copied_or_left_out(
    tiny: Tiny, tmp_path: Path, family: str, old_first: bool
) -> None:
    buffers, new = OLD_BUFFERS[family], tiny(family, seed=1)
    old = edited(tiny(family), tmp_path / "old", add=buffers)
    plan = merge(average(*((old, new) if old_first else (new, old))), tmp_path / "out")
    assert not unaccounted(plan)
    assert not plan.warnings
    merged = tensors_of(tmp_path / "out")
    if old_first:
        assert all(torch.equal(merged[name], tensor) for name, tensor in buffers.items())
    else:
        assert {name for _, name, _ in plan.left_out} == set(buffers)
    assert set(merged) == set(tensors_of(old if old_first else new))
    load_checked(tmp_path / "out", FAMILIES[family].auto_class)


# --- shards


def test_shards_in_and_out(tiny: Tiny, tmp_path: Path) -> None:
    whole = [tiny("llama", seed=seed) for seed in (0, 1)]
    split = [tiny("llama", seed=seed, max_shard_size="20KB") for seed in (0, 1)]
    assert all(len(list(folder.glob("model-*.safetensors"))) > 2 for folder in split)
    for name, models, size in (("a", whole, 0), ("b", split, 0), ("c", whole, 20_000), ("d", split, 20_000)):
        merge(average(*models), tmp_path / name, shard_size=size)
    wanted = tensors_of(tmp_path / "a")
    for name in "bcd":
        tensors = tensors_of(tmp_path / name)
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[n], wanted[n]) for n in wanted)
    index = json.loads((tmp_path / "d" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(wanted)
    files = sorted((tmp_path / "d").glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    a, d = (outputs_of(load_checked(tmp_path / name)) for name in "ad")
    assert torch.equal(a, d)


# --- vocabularies of different size


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert_masked", "llava"])
@pytest.mark.parametrize("small_first", [True, False])
def test_vocabularies_are_cut_to_the_smallest(tiny: Tiny, tmp_path: Path, family: str, small_first: bool) -> None:
    sizes = dict(FAMILIES[family].sizes)
    more = {"text_config": {**sizes["text_config"], "vocab_size": 67}} if family == "llava" else {"vocab_size": 67}
    small, large = tiny(family), tiny(family, seed=1, **more)
    plan = merge(average(*((small, large) if small_first else (large, small))), tmp_path / "out")
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


def write_tokenizer(folder: Path, last: int) -> None:
    """A word-level tokenizer with ids 0 ... ``last``."""
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(last)}, "unk_token": "w0"}
    added = [{"id": last, "content": "<pad>", "special": True}]
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))


def test_rows_that_the_tokenizer_needs_are_not_cut(tiny: Tiny, tmp_path: Path) -> None:
    small, large = tiny("llama"), edited(tiny("llama", seed=1, vocab_size=67), tmp_path / "large")
    write_tokenizer(large, 66)
    with pytest.raises(IncompatibleError, match=r"cut to 61 rows, but .* ids up to 66"):
        mergekit.plan(average(large, small))
    mergekit.plan(average(small, large))
    mergekit.plan(average(large, small), mergekit.RunOptions(unsafe_truncate_embeddings=True))
    write_tokenizer(large, 60)
    plan = merge(average(large, small), tmp_path / "out")
    assert len(tensors_of(tmp_path / "out")[HEAD]) == 61
    assert any("61 rows" in warning for warning in plan.warnings)


def test_special_tokens_of_the_config_are_not_cut(tiny: Tiny, tmp_path: Path) -> None:
    small, large = tiny("llama"), tiny("llama", seed=1, vocab_size=67, pad_token_id=66)
    with pytest.raises(IncompatibleError, match=r"cut to 61 rows, but pad_token_id of .* is 66"):
        mergekit.plan(average(large, small))
    plan = merge(average(large, small), tmp_path / "out", unsafe_truncate_embeddings=True)
    assert config_of(tmp_path / "out")["pad_token_id"] is None
    assert any("pad_token_id" in warning for warning in plan.warnings)
    load_checked(tmp_path / "out")


def test_other_shapes_are_refused_with_a_table(tiny: Tiny) -> None:
    a, b = tiny("llama"), tiny("llama", seed=1, intermediate_size=41)
    with pytest.raises(IncompatibleError, match=r"(?s)model\.layers\.0\.mlp\.\w+\.weight: shapes differ.*37.*41"):
        mergekit.plan(average(a, b))
