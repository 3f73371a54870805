"""One architecture under several spellings: prefixes that come and go, older names and buffers, shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mergekit
from mergekit.errors import IncompatibleError
from mergekit.families.align import align
from tiny import (
    FAMILIES,
    average,
    edited,
    is_shared,
    load_checked,
    merge,
    names_of,
    outputs_of,
    tensors_of,
    unaccounted,
)

Tiny = Callable[..., Path]
HEAD = "lm_head.weight"


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


def in_release_4(name: str) -> str:
    """The name that a tensor of LLaVA has in files that transformers 4 wrote."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def in_memory(name: str) -> str:
    """The name that a tensor of LLaVA has in memory, which some trainers write to disk."""
    moved = name.replace("language_model.model.", "model.language_model.")
    return moved.replace("language_model.lm_head.", "lm_head.").replace("vision_tower.", "model.vision_tower.")


def of_old_bert(name: str) -> str:
    """The name that a tensor has in the original BERT files."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


SPELLINGS = [("llava", in_release_4), ("llava", in_memory), ("bert_masked", of_old_bert)]


@pytest.mark.parametrize("old_first", [True, False])
@pytest.mark.parametrize(("family", "spell"), SPELLINGS)
def test_one_architecture_in_two_spellings(
    tiny: Tiny, tmp_path: Path, family: str, spell: Callable[[str], str], old_first: bool
) -> None:
    new, renamed = tiny(family), tiny(family, seed=1)
    old = edited(renamed, tmp_path / "old", rename=spell)
    assert names_of(old) != names_of(new)
    plan = merge(average(*((old, new) if old_first else (new, old))), tmp_path / "out")
    assert not unaccounted(plan)
    assert not plan.left_out
    assert not plan.warnings
    merged, of_new, of_renamed = (tensors_of(folder) for folder in (tmp_path / "out", new, renamed))
    assert len(merged) == len(of_new)
    for name, tensor in of_new.items():
        torch.testing.assert_close(merged[spell(name) if old_first else name], (tensor + of_renamed[name]) / 2)
    load_checked(tmp_path / "out", FAMILIES[family].auto_class)


def test_layers_in_two_spellings_stack(tiny: Tiny, tmp_path: Path) -> None:
    new, renamed = tiny("bert_masked"), tiny("bert_masked", seed=1)
    old = edited(renamed, tmp_path / "old", rename=of_old_bert)
    sources = [[{"model": str(new), "layer_range": [0, 2]}], [{"model": str(old), "layer_range": [1, 3]}]]
    sources.append([{"model": str(m), "layer_range": [0, 1]} for m in (old, new)])
    slices = [{"sources": s} for s in sources]
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "slices": slices, "base_model": str(new)}
    plan = merge(recipe, tmp_path / "out")
    assert not unaccounted(plan)
    assert not [warning for warning in plan.warnings if "left out" in warning]
    merged, of_new, of_renamed = (tensors_of(folder) for folder in (tmp_path / "out", new, renamed))
    for suffix in ("output.LayerNorm.weight", "output.dense.weight"):
        layers = [merged[f"bert.encoder.layer.{n}.{suffix}"] for n in range(5)]
        mine = [of_new[f"bert.encoder.layer.{n}.{suffix}"] for n in range(3)]
        theirs = [of_renamed[f"bert.encoder.layer.{n}.{suffix}"] for n in range(3)]
        wanted = [mine[0], mine[1], theirs[1], theirs[2], (mine[0] + theirs[0]) / 2]
        torch.testing.assert_close(layers, wanted)
    load_checked(tmp_path / "out", "AutoModelForMaskedLM")


def test_names_that_fit_two_ways_are_left_alone() -> None:
    assert align(["bert.a.weight"], ["a.weight", "model.a.weight"]) == {}
    assert align(["bert.a.weight", "model.a.weight"], ["a.weight"]) == {}
    assert align(["bert.a.weight", "a.weight"], ["a.weight"]) == {}
    assert align(["x.act_fn.weight"], ["x.act_fn.beta"]) == {}


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
