"""The JSON Schemas that editors read: they accept what mergekit accepts, and mark what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from command import refusal
from docs_blocks import blocks
from error_cases_build import RECIPE
from error_cases_recipe import REFERENCES, WORDS
from mergekit.errors import RecipeError
from mergekit.methods import get_method, method_names
from mergekit.methods.spec import REQUIRED, Choice, Flag, Integer, Real
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


@pytest.mark.parametrize("name", method_names())
def test_every_parameter_of_every_method_is_known_with_its_values(name):
    spec = get_method(name)
    recipe = {"merge_method": name, "base_model": "c", "models": [{"model": "a"}, {"model": "b"}]}
    for parameter in (*spec.params, *spec.options):
        good, bad = VALUES[type(parameter.kind)](parameter.kind)
        scopes = [recipe, *([] if parameter.scope == "once" else [recipe["models"][0]])]
        for scope in scopes:
            for setting in (good, [good, good], {"value": [good], "filter": "mlp"}, [{"value": good}]):
                scope["parameters"] = {parameter.name: setting}
                assert faults(recipe) == []
            for setting in (bad, [good, bad], {"value": bad}, [{"value": [bad]}]) if parameter.used else ():
                scope["parameters"] = {parameter.name: setting}
                assert faults(recipe)
                assert refusal(load_recipe, recipe)
            del scope["parameters"]


VALUES = {
    Real: lambda kind: (1 if kind.low is None else kind.low, "much" if kind.low is None else kind.low - 1),
    Integer: lambda kind: (kind.low or 1, 1.5),
    Flag: lambda kind: (True, "perhaps"),
    Choice: lambda kind: (kind.words[0], "perhaps"),
}
"""A value that is in order, and one that is not."""


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
def test_what_is_wrong_is_marked_and_refused(recipe):
    assert faults(recipe)
    with pytest.raises(RecipeError):
        load_recipe(recipe)


UNSEEN = {
    "A range of layers is empty",
    "A range goes beyond the model",
    "Sources of a slice differ in length",
    "A module has no content",
    "The recipe asks for modules",
    "A name is not a model reference",
    "Two adapters follow a model",
    "A model is listed twice",
    "One folder has two names",
    "Parameters belong to no model",
    "A slice lacks the base model",
    "There are too many models",
}
"""Errors of the catalogue that no schema can tell: they compare values, or look at models."""


@pytest.mark.parametrize("case", [*WORDS, *REFERENCES], ids=lambda case: case.title)
def test_errors_of_the_catalogue_are_marked_unless_only_the_program_can_know(case, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPE)
    case.build(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    validator = MERGE if case.title == "The recipe is one of a mixture" else None
    marked = not validator.is_valid(recipe) if validator else bool(faults(recipe))
    assert marked != (case.title in UNSEEN)


QUOTED = [
    {"seed": "3"},
    {"tokenizer": {"pad_to_multiple_of": "64"}},
    {"tokenizer": {"tokens": {"x": {"force": "yes"}}}},
    {"tokenizer": {"tokens": {"x": {"force": 1}}}},
    {"merge_method": "passthrough", "models": None, "slices": [{"sources": [{"model": "a", "layer_range": ["0", 1]}]}]},
]


@pytest.mark.parametrize("change", QUOTED, ids=json.dumps)
def test_only_values_in_needless_quotes_are_marked_though_they_are_read(change):
    assert faults({**BASE, **change})
    assert load_recipe({**BASE, **change})


NAMES = sorted({p.name for m in map(get_method, method_names()) for p in (*m.params, *m.options)})
SCALARS = st.sampled_from([0, 1, 0.5, -1, 1e-9, 1.5, True, False, "1e-5", "0.5", "none", "l1", "much", "", None])
ODD = {
    ("dtype",): ["bfloat16", "torch.float16", "int8", None, 16],
    ("rounding",): ["nearest", "stochastic", "up", None],
    ("seed",): [0, 7, 3.0, -1, 2**63, 1.5, True, None],
    ("chat_template",): ["auto", None, 3],
    ("tokenizer_source",): ["base", "union", "a", None, 3, {"model": "a"}],
    ("tokenizer",): [None, {}, {"source": "union"}, {"source": None}, {"pad_to_multiple_of": 0}, {"tokens": {"x": {}}}],
    ("models",): [None, [], [{"model": "b"}], "b"],
    ("slices",): [None, [], [{"sources": [{"model": "b", "layer_range": [0, 1]}]}]],
    ("modules",): [None, {}, {"default": {"models": [{"model": "b"}]}}],
    ("base_model",): ["c", None, "", 3, {"model": "c", "lora": None}, {"model": {"path": "c", "revision": None}}],
    ("models", 0): [{"modle": "a"}, "a", {"model": "a", "parameters": None}, {"model": "d"}, {"model": {"model": "d"}}],
    ("parameters",): [None, {}, 3, {"densty": 1}, {"embed_slerp": "x"}, {"t": "x"}],
    ("input_model_parameters",): [None, {}, {"a": {}}, {"b": None}],
}
"""What may stand at a place of a recipe: some of it is in order, some is not."""


@st.composite
def _recipes(draw):
    """A recipe that is in order but for up to two places, if at all."""
    method = get_method(draw(st.sampled_from(method_names())))
    names = "abd"[: max(1, min(method.least, 3) - (method.base == "required"))]
    needed = {
        p.name: p.kind.words[0] if isinstance(p.kind, Choice) else 1 for p in method.params if p.default is REQUIRED
    }
    recipe = {"merge_method": method.name, "models": [{"model": name} for name in names], "parameters": needed}
    if method.base == "required":
        recipe["base_model"] = "c"
    scalars = st.one_of(SCALARS, st.lists(SCALARS, max_size=2))
    filtered = st.fixed_dictionaries({"value": scalars}, optional={"filter": st.sampled_from(["mlp", None, 3])})
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=1)):
        scope = draw(st.sampled_from([recipe, recipe["models"][0]]))
        scope["parameters"] = {
            **scope.get("parameters", {}),
            name: draw(scalars | filtered | st.lists(filtered, max_size=2)),
        }
    for path in draw(st.lists(st.sampled_from(list(ODD)), max_size=2, unique=True)):
        holder = recipe if len(path) == 1 else recipe.get(path[0])
        if isinstance(holder, (dict, list)) and (len(path) == 1 or holder):
            holder[path[-1]] = draw(st.sampled_from(ODD[path]))
    return recipe


@settings(max_examples=400, deadline=None, derandomize=True)
@given(_recipes())
def test_whatever_is_marked_is_refused(recipe):
    if faults(recipe):
        assert refusal(load_recipe, recipe), faults(recipe)


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
    assert faults({**sound, "architecture": "Mixtral"})
    assert MoeConfiguration.model_validate({**sound, "architecture": "Mixtral"})  # the program takes any case
