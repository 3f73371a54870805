"""Adapters as experts: baked as everywhere, and what experts can't hold of them is said and must be allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit
from dense import MEMBERS, save_dense
from lora_files import settings
from mergekit.api import plan_moe
from mergekit.errors import UsageError
from mergekit.planning.expression import leaves

PHI3 = MEMBERS["medium"]
HIDDEN, FFN, LAYERS = PHI3["hidden_size"], PHI3["intermediate_size"], PHI3["num_hidden_layers"]
MLP = {"mlp.gate_up_proj": (2 * FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
ATTENTION = {"self_attn.o_proj": (HIDDEN, HIDDEN)}


def write_lora(folder: Path, modules: dict[str, tuple[int, int]], seed: int = 0) -> Path:
    """A LoRA adapter of rank 4 and alpha 8."""
    import json

    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, (outputs, inputs) in modules.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(4, inputs, generator=draw)
            tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(outputs, 4, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings(r=4, lora_alpha=8)))
    return folder


@pytest.fixture
def models(tmp_path) -> Path:
    save_dense(tmp_path / "base", PHI3)
    write_lora(tmp_path / "mlp", MLP)
    write_lora(tmp_path / "both", {**MLP, **ATTENTION}, seed=1)
    return tmp_path


def recipe(models: Path, *adapters: str, **words: object) -> dict[str, object]:
    experts = [{"source_model": f"{models / 'base'}+{models / a}" if a else str(models / "base")} for a in adapters]
    return {"base_model": str(models / "base"), "gate_mode": "random", "experts": experts, **words}


@pytest.mark.parametrize("form", ["mixtral", "phi3moe"])
def test_an_adapter_is_the_expert_that_baking_it_first_would_give(form, models):
    dense = mergekit.run_merge(
        {"merge_method": "passthrough", "models": [{"model": f"{models / 'base'}+{models / 'mlp'}"}]}, models / "baked"
    )
    words = recipe(models, "mlp", "", architecture=form)
    one = mergekit.run_moe(words, models / "one", verify=False, threads=1)
    words["experts"][0]["source_model"] = str(dense)
    two = mergekit.run_moe(words, models / "two", verify=False)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_the_sum_is_the_formula_of_the_paper(models):
    out = load_file(mergekit.run_moe(recipe(models, "mlp", ""), models / "out", verify=False) / "model.safetensors")
    base, adapter = load_file(models / "base/model.safetensors"), load_file(models / "mlp/adapter_model.safetensors")
    name = "model.layers.1.mlp.gate_up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    expected = base[f"{name}.weight"].double() + 2.0 * b @ a
    experts = "model.layers.1.block_sparse_moe.experts.0"
    found = torch.cat([out[f"{experts}.w1.weight"], out[f"{experts}.w3.weight"]])
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_attention_of_an_adapter_needs_to_be_allowed_to_be_lost(models):
    with pytest.raises(UsageError, match=r"expert 1 .* adapter on o_proj \(3 modules\)") as caught:
        plan_moe(recipe(models, "mlp", "both"))
    assert "allow_partial_adapters: true" in str(caught.value)
    plan = plan_moe(recipe(models, "mlp", "both", allow_partial_adapters=True)).plan
    assert any("left out (allow_partial_adapters)" in w for w in plan.warnings)
    lost = [name for _, name, reason in plan.left_out if "adapter" in reason]
    assert len(lost) == 2 * LAYERS
    assert all("o_proj" in name for name in lost)


def test_with_average_attention_nothing_of_an_adapter_is_lost(models):
    plan = plan_moe(recipe(models, "mlp", "both", attention="average")).plan
    used = {(read.source, read.info.name) for o in plan.outputs for read in leaves(o.expression)}
    for number, source in enumerate(plan.sources):
        if source.adapter:
            names = set(load_file(Path(source.folder) / "adapter_model.safetensors"))
            assert {name for s, name in used if s == number} == names


def test_the_self_test_holds_for_a_base_with_an_adapter(models):
    words = {**recipe(models, "mlp", ""), "base_model": f"{models / 'base'}+{models / 'both'}"}
    assert (mergekit.run_moe(words, models / "out", verify=True) / "config.json").exists()
