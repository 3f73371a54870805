"""What a mixture's recipe is refused for: before a weight is read, in one line that points at the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dense import COMMON, MEMBERS, save_dense
from mergekit.api import MoeOptions, plan_moe
from mergekit.errors import IncompatibleError, UsageError

PHI3 = MEMBERS["medium"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A base and two experts, and models that don't fit them."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "two")):
        save_dense(root / name, PHI3, seed=seed)
    save_dense(root / "wide", {**PHI3, "intermediate_size": 58})
    save_dense(root / "deep", {**PHI3, "num_hidden_layers": 4})
    save_dense(root / "big vocabulary", {**PHI3, "vocab_size": 101})
    save_dense(root / "narrow", {**PHI3, "hidden_size": 84, "num_attention_heads": 6})
    llama = {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    save_dense(root / "llama", llama)
    save_dense(root / "biased", {**llama, "attention_bias": True})
    qwen = {**COMMON, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    save_dense(root / "qwen", qwen)
    return root


def recipe(models: Path, *experts: str, **words: object) -> dict[str, object]:
    prompts = ["sort a list", "tell a story", "add two numbers", "translate a word"]
    entries = [
        {"source_model": str(models / e), "positive_prompts": [p]} for e, p in zip(experts, prompts, strict=False)
    ]
    return {"base_model": str(models / "base"), "experts": entries, **words}


def fault(tmp_path: Path, record: object, **choices: object) -> str:
    """The message with which a recipe is refused; the recipe is a file, so that the message names a line."""
    path = tmp_path / "r.yml"
    path.write_text(record if isinstance(record, str) else yaml.safe_dump(record, sort_keys=False))
    with pytest.raises((UsageError, IncompatibleError)) as caught:
        plan_moe(path, choices=MoeOptions(**choices))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"experts_per_token": 3}, "experts_per_token is 3, but there are 2 experts"),
        ({"experts_per_token": 0}, "experts_per_token"),
        ({"experts": []}, "experts"),
        ({"gate_mode": "hiden"}, "no gate mode 'hiden'"),
        ({"gate_modes": "hidden"}, "Did you mean 'gate_mode'?"),
        ({"architecture": "mixtrall"}, "no architecture 'mixtrall'"),
        ({"architecture": "DeepSeek MoE"}, "not built yet"),
        ({"attention": "mean"}, "'mean': write base, average"),
        ({"attention": {"merge_method": "tise"}}, "tise"),
        ({"attention": {"merge_method": "ties", "parameters": {"densty": 0.5}}}, "no parameter 'densty'"),
        ({"dtype": "float12"}, "no dtype 'float12'"),
        ({"shared_experts": [{"source_model": "x"}]}, "shared experts"),
        ({"seed": -1}, "seed"),
    ],
)
def test_words_that_cannot_be_meant(change, expected, models, tmp_path):
    message = fault(tmp_path, {**recipe(models, "one", "two"), **change})
    assert expected in message
    assert "r.yml:" in message


@pytest.mark.parametrize(
    ("expert", "expected"),
    [
        ("wide", "it has [96, 58]"),
        ("deep", "4 layers, but the base has 3"),
        ("big vocabulary", "101 rows of embeddings, but the base has 97"),
        ("narrow", "a hidden size of 84, but the base has 96"),
        ("llama", "a 'llama' model, but the base is a 'phi3'"),
        ("qwen", "biases on query, key and value"),
        ("biased", "biases in attention"),
    ],
)
def test_experts_that_do_not_fit(expert, expected, models, tmp_path):
    assert expected in fault(tmp_path, recipe(models, "one", expert))


def test_phi3moe_takes_phi3_only(models, tmp_path):
    record = {**recipe(models, "llama", "llama"), "base_model": str(models / "llama")}
    assert "no exact Phi-3 MoE" in fault(tmp_path, {**record, "architecture": "phi3moe"}, allow_all_same=True)


def test_all_experts_the_same_need_the_long_flag(models, tmp_path):
    record = recipe(models, "one", "one")
    assert "--i-understand-this-is-not-useful-without-training" in fault(tmp_path, record)
    assert plan_moe(record, choices=MoeOptions(allow_all_same=True)).plan.outputs
    assert "--i-understand" in fault(tmp_path, {**record, "gate_mode": "random"})


def test_prompts_are_needed_unless_routers_are_random(models, tmp_path):
    record = recipe(models, "one", "two")
    del record["experts"][1]["positive_prompts"]
    message = fault(tmp_path, record)
    assert "expert 1" in message
    assert "positive_prompts" in message
    for mode in ("random", "uniform_random"):
        assert plan_moe({**record, "gate_mode": mode}).plan.outputs


def test_identical_prompts_are_refused(models, tmp_path):
    record = recipe(models, "one", "two")
    record["experts"][1]["positive_prompts"] = record["experts"][0]["positive_prompts"]
    assert "same prompts" in fault(tmp_path, record)


def test_some_identical_prompts_are_a_warning(models):
    record = recipe(models, "one", "two", "base")
    record["experts"][1]["positive_prompts"] = record["experts"][0]["positive_prompts"]
    assert any("expert 1 has the prompts of expert 0" in w for w in plan_moe(record).plan.warnings)


def test_a_missing_prompt_file_is_refused(models, tmp_path):
    record = recipe(models, "one", "two")
    record["experts"][0]["positive_prompts_file"] = "no-such-file.txt"
    assert "no-such-file.txt" in fault(tmp_path, record)


def test_a_tensor_without_a_place_is_refused(models, tmp_path):
    """A model that claims to be Llama but has biases."""
    import shutil

    folder = shutil.copytree(models / "biased", tmp_path / "sly")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    record = {**recipe(models, "llama", "llama"), "base_model": str(folder)}
    assert "has no place for tensor model.layers.0.self_attn" in fault(tmp_path, record, allow_all_same=True)


def test_yaml_and_yml_find_each_other(models, tmp_path):
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe(models, "one", "two")))
    assert plan_moe(tmp_path / "r.yaml").plan.outputs


def test_what_experts_learnt_outside_their_mlps_is_said_to_be_lost(models):
    warnings = plan_moe(recipe(models, "one", "two")).plan.warnings
    assert any("head do not come from one, two" in w for w in warnings)
    warnings = plan_moe(recipe(models, "one", "two", attention="average")).plan.warnings
    assert not any("do not come from" in w for w in warnings)


def test_embeddings_of_other_vocabularies_are_not_merged(models, tmp_path):
    import shutil

    for name, words in (("base", {"a": 0, "b": 1}), ("one", {"a": 1, "b": 0})):
        folder = shutil.copytree(models / name, tmp_path / name)
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": words}}))
    shutil.copytree(models / "two", tmp_path / "two")
    record = {**recipe(tmp_path, "one", "two"), "gate_mode": "random"}
    assert any("another vocabulary than the base" in w for w in plan_moe(record).plan.warnings)
    message = fault(tmp_path, {**record, "attention": "average"})
    assert "'a' is 1, not 0" in message
    assert "can't be merged" in message


def test_faults_of_the_shared_merge_point_at_attention(models, tmp_path):
    message = fault(tmp_path, {**recipe(models, "one", "two"), "attention": {"merge_method": "ties"}})
    assert "'ties' needs 'weight'" in message
    assert "under 'parameters' of 'attention'" in message
    assert "r.yml:" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": 5}, "config.json says 5 layers, but the files hold 3 layers"),
        ({"num_hidden_layers": 10**9}, "config.json says 1000000000 layers"),
        ({"num_key_value_heads": 3}, "qkv_proj.weight has to be [192, 96]"),
        ({"num_key_value_heads": "x"}, "no usable 'num_key_value_heads'"),
        ({"head_dim": [1]}, "no usable 'head_dim'"),
        ({"vocab_size": 2048}, "embed_tokens.weight has to be [2048, 96]"),
        ({"vocab_size": None}, "no usable 'vocab_size'"),
        ({"sliding_window": 0}, "no usable 'sliding_window'"),
        ({"rope_theta": "x"}, "no usable rotary settings"),
        ({"rope_theta": None}, "no usable rotary settings"),
        ({"partial_rotary_factor": 2.0}, "no usable rotary settings"),
        ({"rope_scaling": {"type": "longrope"}}, "no usable rotary settings"),
        ({"rope_scaling": {"type": "longrope", "short_factor": 1, "long_factor": [1]}}, "no usable rotary settings"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear' rotary scaling"),
    ],
)
@pytest.mark.parametrize("form", ["mixtral", "phi3moe"])
def test_a_base_that_is_not_what_its_config_says(form, change, expected, models, tmp_path):
    import shutil

    base = shutil.copytree(models / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **change}))
    record = {**recipe(models, "one", "two"), "base_model": str(base), "architecture": form}
    with pytest.raises((UsageError, IncompatibleError)) as caught:
        plan_moe(record)
    assert expected in str(caught.value)


def test_an_untied_expert_unties_the_head_of_the_average(tmp_path):
    save_dense(tmp_path / "base", {**PHI3, "tie_word_embeddings": True})
    save_dense(tmp_path / "one", {**PHI3, "tie_word_embeddings": True}, seed=1)
    save_dense(tmp_path / "two", PHI3, seed=2)
    words = {**recipe(tmp_path, "one", "two"), "gate_mode": "random"}
    assert json.loads(plan_moe(words).plan.config)["tie_word_embeddings"] is True
    merged = plan_moe({**words, "attention": "average"}).plan
    assert "lm_head.weight" in [o.name for o in merged.outputs]
    assert json.loads(merged.config)["tie_word_embeddings"] is False


def test_what_a_config_leaves_out_is_the_familys_default(tmp_path):
    """Mixtral's own defaults are others."""
    for name in ("base", "one", "two"):
        save_dense(tmp_path / name, {**COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral"})
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        del config["rms_norm_eps"]
        config["max_position_embeddings"] = 8192
        path.write_text(json.dumps(config))
    config = json.loads(plan_moe({**recipe(tmp_path, "one", "two"), "gate_mode": "random"}).plan.config)
    assert config["sliding_window"] == 4096
    assert config["rms_norm_eps"] == 1e-6


def test_a_pipe_is_no_prompt_file(models, tmp_path):
    import os

    os.mkfifo(tmp_path / "p.txt")
    record = recipe(models, "one", "two")
    record["experts"][0]["positive_prompts_file"] = str(tmp_path / "p.txt")
    assert "no regular file" in fault(tmp_path, record)
