"""Layer stacking: slices renumbered, configs kept true, results that load and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit
from mergekit.errors import IncompatibleError, RecipeError
from mergekit.families.stacking import stack_layers
from mergekit.planning.expression import Apply
from mergekit.planning.plan import Plan
from tiny import FAMILIES, config_of, edited, load_checked, merge, outputs_of, tensors_of, unaccounted

Tiny = Callable[..., Path]
Range = tuple[Path, int, int]

STACKS = {
    "llama": "model.layers.",
    "llava": "language_model.model.layers.",
    "qwen2_5_vl": "model.layers.",
    "modernbert": "model.layers.",
    "falcon_7b": "transformer.h.",
    "gpt2": "transformer.h.",
    "gpt_neox": "gpt_neox.layers.",
    "falcon": "transformer.h.",
    "phi3": "model.layers.",
    "qwen2": "model.layers.",
    "qwen3": "model.layers.",
    "qwen3_moe": "model.layers.",
    "mixtral": "model.layers.",
    "gemma2": "model.layers.",
    "gemma3": "model.layers.",
    "mamba": "backbone.layers.",
    "lfm2": "model.layers.",
    "granite_hybrid": "model.layers.",
    "gpt_oss": "model.layers.",
    "deepseek_v3": "model.layers.",
    "bert_masked": "bert.encoder.layer.",
    "roberta_classifier": "roberta.encoder.layer.",
    "distilbert_classifier": "distilbert.transformer.layer.",
}
COUNT_KEYS = {"gpt2": "n_layer", "distilbert_classifier": "n_layers"}


def slices(*parts: Range | Sequence[Range], **more: Any) -> dict[str, Any]:
    """A passthrough recipe of slices, each of one range ``(model, start, end)`` or of several that are merged."""
    record: list[dict[str, Any]] = []
    for part in parts:
        ranges = [part] if isinstance(part[0], Path) else part
        record.append({"sources": [{"model": str(m), "layer_range": [a, b]} for m, a, b in ranges]})  # type: ignore[misc]
    return {"merge_method": "passthrough", "slices": record, **more}


def layer(tensors: Mapping[str, torch.Tensor], prefix: str, number: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer by the rest of their names."""
    start = f"{prefix}{number}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def assert_layers(out: Path, prefix: str, sources: Sequence[tuple[Path, int]]) -> None:
    """The output's layers are the ``sources``, in order, and there are no more of them."""
    tensors, known = tensors_of(out), {folder: tensors_of(folder) for folder, _ in sources}
    for number, (folder, old) in enumerate(sources):
        mine, theirs = layer(tensors, prefix, number), layer(known[folder], prefix, old)
        assert mine.keys() == theirs.keys(), f"layer {number}"
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), f"layer {number}"
    assert not layer(tensors, prefix, len(sources))


def applied(plan: Plan, parameter: str) -> dict[str, Any]:
    """The value of a method's parameter for each computed tensor."""
    return {o.name: dict(o.expression.parameters)[parameter] for o in plan.outputs if isinstance(o.expression, Apply)}


@pytest.mark.parametrize("family", STACKS)
def test_depth_up_stack_loads_and_runs(tiny: Tiny, tmp_path: Path, family: str) -> None:
    model, out, prefix = tiny(family), tmp_path / "out", STACKS[family]
    plan = merge(slices((model, 0, 2), (model, 1, 3)), out)
    assert not unaccounted(plan)
    assert not plan.left_out
    assert_layers(out, prefix, [(model, 0), (model, 1), (model, 1), (model, 2)])
    before, after = tensors_of(model), tensors_of(out)
    outside = [name for name in before if not name.startswith(prefix)]
    assert all(torch.equal(before[name], after[name]) for name in outside)
    assert {name for name in after if not name.startswith(prefix)} == set(outside)
    config = config_of(out)
    assert config.get("text_config", config)[COUNT_KEYS.get(family, "num_hidden_layers")] == 4
    loaded = load_checked(out, FAMILIES[family].auto_class)
    assert outputs_of(loaded, FAMILIES[family].reads).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "lfm2"])
def test_stack_generates(tiny: Tiny, tmp_path: Path, family: str) -> None:
    model = tiny(family)
    merge(slices((model, 0, 3), (model, 1, 3)), tmp_path / "out")
    loaded = load_checked(tmp_path / "out", FAMILIES[family].auto_class)
    tokens = torch.tensor([[5, 7, 11]])
    result = loaded.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, min_new_tokens=4, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert result.sequences.shape == (1, 7)
    assert all(logits.isfinite().all() for logits in result.logits)


def test_text_layers_are_told_from_image_layers_of_the_same_number(tiny: Tiny, tmp_path: Path) -> None:
    vision = {**FAMILIES["llava"].sizes["vision_config"], "num_hidden_layers": 3}
    model, out = tiny("llava", vision_config=vision), tmp_path / "out"
    merge(slices((model, 0, 3), (model, 2, 3)), out)
    assert_layers(out, STACKS["llava"], [(model, 0), (model, 1), (model, 2), (model, 2)])
    assert config_of(out)["vision_config"]["num_hidden_layers"] == 3
    load_checked(out, FAMILIES["llava"].auto_class)


def test_whole_range_is_the_model_itself(tiny: Tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    plan = merge(slices((model, 0, 3)), out)
    before, after = tensors_of(model), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert config_of(out) == config_of(model)
    assert not plan.warnings


def test_first_slice_gives_embeddings_and_last_slice_gives_head(tiny: Tiny, tmp_path: Path) -> None:
    a, b, c = (tiny("llama", seed=seed, num_hidden_layers=layers) for seed, layers in ((0, 3), (1, 5), (2, 2)))
    out = tmp_path / "out"
    plan = merge(slices((a, 0, 3), (b, 2, 5), (c, 0, 1)), out)
    assert_layers(out, "model.layers.", [(a, 0), (a, 1), (a, 2), (b, 2), (b, 3), (b, 4), (c, 0)])
    merged = tensors_of(out)
    assert torch.equal(merged["model.embed_tokens.weight"], tensors_of(a)["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(merged[name], tensors_of(c)[name])
    assert config_of(out)["num_hidden_layers"] == 7
    assert not unaccounted(plan)
    left = {(source, name): reason for source, name, reason in plan.left_out}
    assert left[0, "lm_head.weight"] == "another slice gives this tensor"
    assert left[1, "model.layers.0.mlp.up_proj.weight"] == "outside the slices"
    assert outputs_of(load_checked(out)).isfinite().all()


def test_layers_of_one_position_may_come_in_any_order(tiny: Tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    merge(slices((model, 2, 3), (model, 0, 1), (model, 2, 3)), out)
    assert_layers(out, "model.layers.", [(model, 2), (model, 0), (model, 2)])


@pytest.mark.parametrize(
    ("family", "key", "types"),
    [
        ("gemma2", "layer_types", ["sliding_attention", "full_attention"] * 2),
        ("qwen3", "layer_types", ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]),
        ("lfm2", "layer_types", ["conv", "full_attention", "conv", "full_attention"]),
        ("granite_hybrid", "layer_types", ["mamba", "attention", "mamba", "mamba"]),
    ],
)
def test_per_layer_lists_follow_their_layers(
    tiny: Tiny, tmp_path: Path, family: str, key: str, types: list[str]
) -> None:
    more = {"use_sliding_window": True, "sliding_window": 7} if family == "qwen3" else {}
    model = tiny(family, num_hidden_layers=4, layer_types=types, **more)
    out, listed = tmp_path / "out", config_of(model)[key]
    assert len(set(listed)) == 2
    merge(slices((model, 0, 3), (model, 1, 4)), out)
    assert config_of(out)[key] == [listed[i] for i in (0, 1, 2, 1, 2, 3)]
    assert outputs_of(load_checked(out)).isfinite().all()


@pytest.mark.parametrize(
    ("family", "given", "types"),
    [
        ("gemma2", {}, "sfsf"),
        ("gemma3", {"sliding_window_pattern": 3}, "ssfs"),
        ("gemma3", {}, "ssss"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7}, "fsss"),
    ],
)
def test_kinds_of_layers_that_older_configs_leave_to_position_are_written_down(
    tiny: Tiny, tmp_path: Path, family: str, given: dict[str, Any], types: str
) -> None:
    made = tiny(family, num_hidden_layers=4)
    unsaid = {"layer_types": None, "sliding_window_pattern": None, **given}
    model = edited(made, tmp_path / "old", config=unsaid)
    merge(slices((model, 1, 4), (model, 1, 2)), tmp_path / "out")
    words = {"s": "sliding_attention", "f": "full_attention"}
    assert config_of(tmp_path / "out")["layer_types"] == [words[types[i]] for i in (1, 2, 3, 1)]


def test_lists_of_layer_numbers_are_renumbered(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1, 3])
    out = tmp_path / "out"
    merge(slices((model, 0, 3), (model, 1, 4)), out)
    assert config_of(out)["mlp_only_layers"] == [1, 3, 5]
    assert outputs_of(load_checked(out)).isfinite().all()


def test_configs_without_a_layer_count(tmp_path: Path) -> None:
    pattern = {"hybrid_override_pattern": "M-*M", "eos_token_id": [1, 2, 3, 4]}
    layers = [(pattern, number) for number in (0, 1, 2, 1, 2, 3)]
    config, warnings = stack_layers(pattern, layers, count=4)
    assert config == {**pattern, "hybrid_override_pattern": "M-*-*M"}
    assert not warnings
    _, warnings = stack_layers({}, layers, count=4)
    assert warnings == ["config.json names no layer count; set it to 6 by hand"]


def test_tensors_that_a_slice_has_no_place_for_are_named(tiny: Tiny) -> None:
    plain, biased = tiny("llama"), tiny("llama_biased", seed=1)
    recipe = slices([(plain, 0, 2), (biased, 1, 3)], [(plain, 2, 3)], merge_method="linear", parameters={"weight": 1})
    plan = mergekit.plan(recipe)
    assert not unaccounted(plan)
    left = {name: reason for source, name, reason in plan.left_out if source == 1}
    assert left["model.layers.1.self_attn.q_proj.bias"] == "the model that it is merged with has no such tensor"
    assert left["model.layers.0.self_attn.q_proj.bias"] == "outside the slices"
    assert left["model.norm.weight"] == "another slice gives this tensor"
    assert ["the model that it is merged with" in warning for warning in plan.warnings] == [True]


def test_settings_that_count_layers_are_named_only_where_they_matter(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("deepseek_v3", num_hidden_layers=3, first_k_dense_replace=1)
    unmoved = mergekit.plan(slices((model, 0, 2)))
    assert not [w for w in unmoved.warnings if "position" in w]
    moved = mergekit.plan(slices((model, 0, 3), (model, 0, 1)))
    assert ["first_k_dense_replace" in w for w in moved.warnings] == [True]
    for family in ("qwen2", "qwen3_moe"):
        plain = tiny(family)
        assert not mergekit.plan(slices((plain, 0, 2), (plain, 1, 3))).warnings


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_slices_merge_layers_of_different_numbers(tiny: Tiny, tmp_path: Path, method: str) -> None:
    a, b = (tiny("llama", seed=seed, num_hidden_layers=4) for seed in (0, 1))
    more: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
    more |= {"base_model": str(a), "parameters": {"t": 0}} if method == "slerp" else {"parameters": {"weight": 1}}
    plan = merge(slices([(a, 0, 2), (b, 1, 3)], [(a, 2, 4), (b, 0, 2)], **more), tmp_path / "out")
    merged, of_a, of_b = tensors_of(tmp_path / "out"), tensors_of(a), tensors_of(b)
    for number, (mine, theirs) in enumerate([(0, 1), (1, 2), (2, 0), (3, 1)]):
        for suffix, tensor in layer(merged, "model.layers.", number).items():
            x, y = of_a[f"model.layers.{mine}.{suffix}"], of_b[f"model.layers.{theirs}.{suffix}"]
            torch.testing.assert_close(tensor, x if method == "slerp" else (x + y) / 2)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        wanted = of_a[name] if method == "slerp" else (of_a[name] + of_b[name]) / 2
        torch.testing.assert_close(merged[name], wanted)
    assert not unaccounted(plan)
    assert outputs_of(load_checked(tmp_path / "out")).isfinite().all()


def test_gradients_restart_in_every_slice(tiny: Tiny) -> None:
    a, b = (tiny("llama", seed=seed, num_hidden_layers=4) for seed in (0, 1))
    parts = [[(a, 0, 3), (b, 0, 3)], [(a, 3, 4), (b, 3, 4)], [(a, 1, 4), (b, 1, 4)]]
    recipe = slices(*parts, merge_method="slerp", base_model=str(a), parameters={"t": [0.25, 0.75]})
    t = applied(mergekit.plan(recipe), "t")
    depths = [t[f"model.layers.{number}.mlp.up_proj.weight"] for number in range(7)]
    assert depths == [0.25, 0.5, 0.75, 0.75, 0.25, 0.5, 0.75], "a slice of one layer stands at the end of its gradient"
    assert t["model.embed_tokens.weight"] == t["model.norm.weight"] == t["lm_head.weight"] == 0.25


def test_parameters_of_a_slice_and_of_a_source_apply_there_only(tiny: Tiny) -> None:
    a, b = (tiny("llama", seed=seed) for seed in (0, 1))
    recipe = slices([(a, 0, 1), (b, 0, 1)], [(a, 1, 3), (b, 1, 3)], merge_method="linear", parameters={"weight": 1})
    recipe["slices"][0]["parameters"] = {"weight": 2}
    recipe["slices"][1]["sources"][1]["parameters"] = {"weight": 3}
    weight = applied(mergekit.plan(recipe), "weight")
    assert [weight[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(3)] == [(2, 2), (1, 3), (1, 3)]
    assert weight["model.embed_tokens.weight"] == (2, 2)
    assert weight["lm_head.weight"] == (1, 3)


def test_passthrough_scales_by_filter(tiny: Tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    scale = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.5}, {"value": 1.0}]
    recipe = slices((model, 0, 2), (model, 1, 3))
    recipe["slices"][1]["sources"][0]["parameters"] = {"scale": scale}
    merge(recipe, out)
    merged, source = tensors_of(out), tensors_of(model)
    for number, old in enumerate([0, 1, 1, 2]):
        for suffix, tensor in layer(merged, "model.layers.", number).items():
            factor = 1.0 if number < 2 else 0.0 if "o_proj" in suffix else 0.5 if "down_proj" in suffix else 1.0
            assert torch.equal(tensor, factor * source[f"model.layers.{old}.{suffix}"]), (number, suffix)
    assert outputs_of(load_checked(out)).isfinite().all()


def test_filters_of_a_source_see_its_own_layer_numbers(tiny: Tiny) -> None:
    model = tiny("llama")
    recipe = slices((model, 1, 3), (model, 1, 2), parameters={"scale": [{"filter": "layers.1.", "value": 0.5}]})
    scaled = {name.split(".")[2] for name in applied(mergekit.plan(recipe), "scale")}
    assert scaled == {"0", "2"}


def test_slice_with_a_base_of_its_own(tiny: Tiny) -> None:
    a, b = (tiny("llama", seed=seed) for seed in (0, 1))
    recipe = slices([(a, 0, 1), (b, 0, 1)], [(a, 1, 3), (b, 1, 3)], merge_method="slerp", parameters={"t": 0.25},
                    base_model=str(a))  # fmt: skip
    recipe["slices"][1]["base_model"] = str(b)
    plan = mergekit.plan(recipe)
    first = {o.name: o.expression.models[0] for o in plan.outputs if isinstance(o.expression, Apply)}
    assert [first[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(3)] == [0, 1, 1]
    assert (first["model.embed_tokens.weight"], first["lm_head.weight"]) == (0, 1)


def test_extra_prediction_layer_is_merged_whole_and_left_out_of_stacks(tiny: Tiny, tmp_path: Path) -> None:
    """Some models store a layer past the last, which predicts the token after next."""
    made, other = tiny("llama"), tiny("llama", seed=1)
    extra = {
        f"model.layers.3.{suffix}": tensor for suffix, tensor in layer(tensors_of(made), "model.layers.", 0).items()
    }
    extra["model.layers.3.enorm.weight"] = torch.rand(22)
    a, b = edited(made, tmp_path / "a", add=extra), edited(other, tmp_path / "b", add=extra)
    whole = mergekit.plan({"merge_method": "linear", "models": [{"model": str(m)} for m in (a, b)],
                           "parameters": {"weight": 1}})  # fmt: skip
    assert not whole.left_out
    assert set(extra) <= {o.name for o in whole.outputs}
    stacked = merge(slices((a, 0, 3), (b, 1, 3)), tmp_path / "out")
    assert_layers(tmp_path / "out", "model.layers.", [(a, 0), (a, 1), (a, 2), (b, 1), (b, 2)])
    assert {name for source, name, _ in stacked.left_out if source == 0} >= set(extra)
    assert not unaccounted(stacked)
    assert any("model.layers.3." in warning for warning in stacked.warnings)
    load_checked(tmp_path / "out")


def test_embeddings_and_head_of_different_sizes_are_refused(tiny: Tiny) -> None:
    a, b = tiny("llama"), tiny("llama", seed=1, vocab_size=67)
    with pytest.raises(IncompatibleError, match=r"61 rows.*67"):
        mergekit.plan(slices((a, 0, 2), (b, 1, 3)))


def test_vocabulary_follows_the_embeddings(tiny: Tiny, tmp_path: Path) -> None:
    a, b = tiny("llama"), tiny("llama", seed=1, vocab_size=67)
    merge(slices((b, 0, 2), (a, 1, 2), (b, 2, 3), base_model=str(a)), tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == 67
    assert load_checked(tmp_path / "out").lm_head.weight.shape[0] == 67


def test_ranges_beyond_the_model_and_of_unequal_length_are_refused(tiny: Tiny) -> None:
    a, b = tiny("llama"), tiny("llama", seed=1)
    with pytest.raises(RecipeError, match=r"layer_range \[1, 4\) is beyond .* 3 layers"):
        mergekit.plan(slices((a, 0, 2), (b, 1, 4)))
    with pytest.raises(RecipeError, match="this source has 1 layers, but the first one of the slice has 2"):
        mergekit.plan(slices([(a, 0, 2), (b, 1, 2)], merge_method="linear", parameters={"weight": 1}))


def test_layers_of_another_shape_are_refused(tiny: Tiny) -> None:
    a, b = tiny("llama"), tiny("llama", seed=1, intermediate_size=41)
    with pytest.raises(
        IncompatibleError, match=r"cannot stack model\.layers\.1\.mlp\.\w+\.weight of .* shape is \[\d+, \d+\]"
    ):
        mergekit.plan(slices((a, 0, 2), (b, 1, 3)))


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_encoder_and_decoder_are_not_sliced_by_guess(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    with pytest.raises(IncompatibleError, match="an encoder and a decoder"):
        mergekit.plan(slices((model, 0, 2), (model, 1, 2)))


def test_stack_of_parts_saved_with_and_without_a_prefix(tiny: Tiny, tmp_path: Path) -> None:
    a = tiny("gpt2")
    bare = edited(tiny("gpt2", seed=1), tmp_path / "bare", rename=lambda name: name.removeprefix("transformer."))
    merge(slices((bare, 0, 2), (a, 1, 3), (bare, 2, 3), base_model=str(a)), tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == {
        *(n for n in tensors_of(a) if ".h." not in n),
        *(f"transformer.h.{i}.{s}" for i in range(5) for s in layer(tensors_of(a), "transformer.h.", 0)),
    }
    load_checked(tmp_path / "out")
