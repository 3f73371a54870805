"""The JSON Schemas that editors read: they accept what mergekit accepts, and mark what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from docs_blocks import blocks
from mergekit.errors import RecipeError
from mergekit.methods import get_method, method_names
from mergekit.moe.schema import MoeConfiguration
from mergekit.recipe import load_recipe

jsonschema = pytest.importorskip("jsonschema", reason="checks recipes against schemas")
ROOT = Path(__file__).parent.parent
MERGE, MIXTURE = (
    jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / name).read_text()))
    for name in ("recipe.schema.json", "moe.schema.json")
)
EXAMPLES = [
    *sorted((ROOT / "examples").glob("*.yml")), ROOT / "examples/phi3_moe/recipe.yml",
    *sorted((ROOT / "output_phi3_moe").glob("*.y*ml")), *sorted((ROOT / "bench").rglob("*.yml")),
]  # fmt: skip


def faults(recipe: object) -> list[str]:
    validator = MIXTURE if isinstance(recipe, dict) and "experts" in recipe else MERGE
    return [error.message for error in validator.iter_errors(recipe)]


def test_the_schemas_are_schemas():
    for validator in (MERGE, MIXTURE):
        jsonschema.Draft202012Validator.check_schema(validator.schema)
        assert all(entry.get("description") for entry in validator.schema["properties"].values())
        for part in validator.schema["$defs"].values():
            assert all(e.get("description") for e in part.get("properties", {}).values() if "properties" in part)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_are_accepted(path):
    assert faults(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.stem)
def test_recipes_of_the_pages_are_accepted(page):
    for block in blocks(page.read_text()):
        recipe = yaml.safe_load(block.text) if block.kind == "yaml" else None
        if isinstance(recipe, dict) and ("merge_method" in recipe or "experts" in recipe):
            assert faults(recipe) == []


@pytest.mark.parametrize("method", method_names())
def test_every_parameter_of_every_method_is_known(method):
    spec = get_method(method)
    names = [p.name for p in (*spec.params, *spec.options) if not p.name.startswith("_")]
    models = [{"model": "a", "parameters": dict.fromkeys(names, 1)}]
    assert faults({"merge_method": method, "models": models, "parameters": {name: [0, 1] for name in names}}) == []


BASE = {"merge_method": "linear", "models": [{"model": "a"}]}
WRONG = [
    {**BASE, "dtyp": "float32"},
    {**BASE, "merge_method": "linaer"},
    {**BASE, "dtype": "int8"},
    {**BASE, "rounding": "up"},
    {**BASE, "seed": -1},
    {**BASE, "seed": "x"},
    {**BASE, "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]},
    {"merge_method": "linear"},
    {"models": [{"model": "a"}]},
    {**BASE, "models": [{"modle": "a"}]},
    {**BASE, "models": ["a"]},
    {**BASE, "models": {"model": "a"}},
    {**BASE, "models": [{"model": 3}]},
    {**BASE, "models": [{"model": {"model": {"pth": "a"}}}]},
    {**BASE, "parameters": {"weigth": 1}},
    {**BASE, "parameters": {"weight": {"valu": 1}}},
    {**BASE, "parameters": {"weight": [[1]]}},
    {**BASE, "parameters": {"weight": [{"value": 1}, 2]}},
    {**BASE, "parameters": {"weight": None}},
    {**BASE, "base_quantization": "int4"},
    {"merge_method": "passthrough", "slices": []},
    {"merge_method": "passthrough", "slices": [{"sources": []}]},
    {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a"}]}]},
    {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 1, 2]}]}]},
    {**BASE, "tokenizer": {"sorce": "union"}},
    {**BASE, "tokenizer": {"pad_to_multiple_of": 0}},
]


@pytest.mark.parametrize("recipe", WRONG, ids=lambda r: json.dumps(r)[:60])
def test_what_is_marked_is_refused(recipe):
    if recipe.get("slices") != []:
        assert faults(recipe)
    with pytest.raises(RecipeError):
        load_recipe(recipe)


def test_mixtures():
    sound = {"base_model": "a", "experts": [{"source_model": "b", "positive_prompts": ["x"]}, {"source_model": "c"}]}
    assert faults(sound) == []
    assert MoeConfiguration.model_validate(sound)
    for change in (
        {"gate_mode": "hiden"},
        {"expert": []},
        {"experts_per_token": 0},
        {"attention": "all"},
        {"dtype": "x"},
    ):
        assert faults({**sound, **change}), change
