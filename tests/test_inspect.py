"""``mergekit inspect``: figures from headers, adapters, mixtures, models that mergekit made, and hostile files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import command
import mergekit
from files import config, encode, llama, write_model, write_safetensors
from hostile.stage import tokenizer
from lora_files import low_rank, write_adapter
from mergekit.api.inspect import inspect_model
from mergekit.errors import CheckpointError, ModelNotFoundError

ROOT = Path(__file__).parent.parent


def test_a_bundled_model():
    found = inspect_model(ROOT / "models/base")
    assert found.headline == "phi3, 4 layers, 1,213,568 parameters, bfloat16"
    assert (found.architecture, found.rows, found.tied) == ("Phi3ForCausalLM", 2048, False)
    assert sum(found.dtypes.values()) == found.parameters
    assert sum(part.count * math.prod(part.shape) for part in found.parts) == found.parameters
    roles = [part.role for part in found.parts]
    assert roles[0] == "embedding"
    assert sorted(roles[-2:]) == ["head", "norm"]
    assert found.vocabulary == "BPE, 2,048 tokens, 7 of them added"
    assert found.special["eos_token"] == "</s>"
    assert "<table" in found._repr_html_()


def test_tied_heads_types_and_shards(tmp_path):
    model = write_model(tmp_path / "m")
    tensors = {name: value for name, value in llama(0).items() if "lm_head" not in name}
    tensors["extra.weight"] = encode("F32", np.ones(3))
    write_safetensors(model / "model.safetensors", tensors)
    (model / "config.json").write_text(json.dumps(config(tie_word_embeddings=True)))
    found = inspect_model(model)
    assert found.tied
    assert dict(found.dtypes)["float32"] == sum(v.size for c, v in tensors.values() if c == "F32") > 0
    assert dict(found.facts())["embeddings"].endswith("the head is tied to the embeddings")
    assert found.nbytes == (model / "model.safetensors").stat().st_size


def test_adapters_alone_and_on_a_model(tmp_path):
    model, adapter = write_model(tmp_path / "m"), write_adapter(tmp_path / "lora", low_rank(3))
    alone, both = inspect_model(adapter), inspect_model(f"{model}+{adapter}")
    assert alone.family == "LoRA adapter"
    assert alone.adapter == both.adapter
    assert alone.adapter.startswith("LoRA of rank 3, alpha 6, on ")
    assert alone.adapter.endswith("for org/base")
    assert both.parameters == inspect_model(model).parameters


def test_a_merged_model_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"merge_method": "linear", "models": [
        {"model": str(write_model(tmp_path / n, i)), "parameters": {"weight": 1}} for i, n in enumerate("ab")
    ]}  # fmt: skip
    out = mergekit.run_merge(recipe, "out")
    assert inspect_model(out).merge == f"by mergekit {mergekit.__version__} from a, b (mergekit_config.yml)"
    (out / "merge_manifest.json").write_text("{}")
    assert "damaged" in inspect_model(out).merge


@pytest.mark.parametrize(
    ("template", "format_"),
    [
        ("{{ '<|im_start|>' }}", "ChatML"),
        ("<|start_header_id|>{{ m }}", "Llama 3"),
        ("[INST] <<SYS>>", "Llama 2"),
        ("[INST] {{ m }}", "Mistral"),
        ("{{ messages }}", "yes, of its own"),
    ],
)
def test_chat_formats(tmp_path, template, format_):
    model = write_model(tmp_path / "m")
    (model / "chat_template.jinja").write_text(template)
    assert inspect_model(model).chat == format_


def test_what_is_wrong_with_small_files_is_a_note(tmp_path):
    model = write_model(tmp_path / "m")
    (model / "tokenizer.json").write_text(json.dumps(tokenizer()))
    assert inspect_model(model).vocabulary.startswith("BPE, 31 tokens")
    (model / "tokenizer.json").write_text("{")
    (model / "config.json").write_text(json.dumps(config(num_experts="many")))
    found = inspect_model(model)
    assert found.experts is None
    assert any("tokenizer.json" in note for note in found.notes)
    json.dumps(found.record(), allow_nan=False)


def test_the_command(tmp_path):
    model = write_model(tmp_path / "m")
    done = command.mergekit("inspect", model)
    assert (done.code, done.err) == (0, "")
    assert "model.layers.{n}.mlp.up_proj.weight" in done.out
    listed = command.mergekit("inspect", model, "--tensors").out
    record = json.loads(command.mergekit("inspect", model, "--json").out)
    assert record == json.loads(json.dumps(inspect_model(model).record()))
    assert all(tensor["name"] in listed for tensor in record["tensors"])
    command.assert_refused(command.mergekit("inspect", tmp_path / "none"), 2, "none")
    (model / "model.safetensors").write_bytes(b"1234567")
    with pytest.raises(CheckpointError):
        inspect_model(model)
    with pytest.raises(ModelNotFoundError):
        inspect_model(tmp_path / "none")
