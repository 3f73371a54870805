"""The language of recipes: what its words mean, how it names models, and that it survives being written and read."""

from __future__ import annotations

import copy
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import mergekit
from files import write_model, write_recipe
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.errors import RecipeError
from mergekit.recipe import load_recipe
from mergekit.recipe.text import read_recipe_text
from mergekit.refs import ModelPath, ModelReference

TEXT = """\
# a comment that stays
merge_method: ties
base_model: a
models:
  - model: b
    parameters: {weight: [0, 1], density: 0.5}
  - model: 'c'
    parameters:
      weight:
        - filter: mlp
          value: 1e-1
        - value: 1
dtype: bfloat16
"""


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Work in a folder with three small models and a recipe."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        write_model(Path(name), seed)
    write_recipe(Path("r.yml"), TEXT)


def configuration(**words: Any) -> MergeConfiguration:
    return MergeConfiguration.model_validate({"merge_method": "linear", "models": [{"model": "a"}], **words})


# Places


def test_places_are_lines_and_columns_counted_from_one():
    text = read_recipe_text(Path("r.yml"))
    assert text.place(("merge_method",)) == "r.yml:2:1"
    assert text.place(("models", 0)) == "r.yml:5:5"
    assert text.place(("models", 0, "parameters", "density")) == "r.yml:6:34"
    assert text.place(("models", 0, "parameters", "weight", 1)) == "r.yml:6:30"
    assert text.place(("models", 1, "parameters", "weight", 0, "value")) == "r.yml:11:11"


def test_a_place_that_is_not_there_is_the_nearest_above():
    text = read_recipe_text(Path("r.yml"))
    assert text.place(("models", 7, "model")) == "r.yml:4:1"
    assert text.place(("nothing",)) == "r.yml:2:1"


def test_merged_and_aliased_nodes_have_places():
    text = read_recipe_text("a: &x {weight: 1}\nb:\n  <<: *x\n  t: 2\nc: *x\n")
    assert text.value == {"a": {"weight": 1}, "b": {"weight": 1, "t": 2}, "c": {"weight": 1}}
    assert text.place(("b", "t")) == "recipe:4:3"
    assert text.place(("b", "weight")) == "recipe:1:8"
    assert text.place(("c", "weight")) == "recipe:1:8"


# Forms


def test_a_recipe_may_be_a_path_a_mapping_or_a_configuration():
    mapping = yaml.safe_load(TEXT)
    plans = [mergekit.plan(r) for r in ("r.yml", Path("r.yml"), mapping, MergeConfiguration.model_validate(mapping))]
    assert len({plan.digest() for plan in plans}) == 1
    assert plans[0].recipe == TEXT
    assert all(yaml.safe_load(plan.recipe) == mapping for plan in plans)


def test_what_is_given_is_not_changed():
    mapping = yaml.safe_load(TEXT)
    config = MergeConfiguration.model_validate(mapping)
    before = copy.deepcopy(mapping), config.model_copy(deep=True)
    mergekit.plan(mapping)
    mergekit.plan(config)
    assert (mapping, config) == before


def test_numbers_of_numpy_and_paths_are_fine_in_a_mapping():
    weight = np.float64(0.5)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": Path("a")}, {"model": "b"}],
        "parameters": {"weight": weight},
    }
    assert load_recipe(recipe).text.text.endswith("weight: 0.5")
    assert mergekit.plan(recipe).sources[0].reference == "a"


def test_an_object_that_yaml_has_no_form_for_is_refused():
    with pytest.raises(RecipeError, match="YAML"):
        load_recipe({"merge_method": "linear", "models": [{"model": object()}]})


@pytest.mark.parametrize(
    "words",
    [
        {"modles": []},
        {"models": [{"model": "a", "wieght": 1}]},
        {"slices": [{"sources": []}]},
        {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]},
        {"dtype": "floaty"},
        {"parameters": {"weight": None}},
        {"seed": -1},
    ],
)
def test_a_configuration_refuses_what_a_recipe_may_not_say(words):
    with pytest.raises(ValidationError):
        configuration(**words)


@pytest.mark.parametrize("words", [{"slices": []}, {"slices": None, "modules": {}}, {"parameters": {}}])
def test_empty_is_the_same_as_absent(words):
    assert configuration(**words).referenced_models() == configuration().referenced_models()


def test_models_are_listed_in_the_order_of_first_mention():
    recipe = {
        "merge_method": "linear",
        "base_model": "z",
        "slices": [
            {"sources": [{"model": m, "layer_range": [0, 1]} for m in sources], **more}
            for sources, more in ((["c", "a"], {}), (["b", "c"], {"base_model": "y"}), (["a", "z"], {}))
        ],
    }
    assert list(map(str, MergeConfiguration.model_validate(recipe).referenced_models())) == ["c", "a", "b", "y", "z"]
    assert list(map(str, configuration(base_model="a").referenced_models())) == ["a"]


DTYPES = {"bfloat16": "bfloat16", "torch.float16": "float16", "float32": "float32", "float64": "float64",
          "bf16": "bfloat16", "fp16": "float16", "half": "float16", "torch.bfloat16": "bfloat16"}  # fmt: skip


@pytest.mark.parametrize("word", ["dtype", "out_dtype"])
@pytest.mark.parametrize("name", DTYPES)
def test_names_of_dtypes(word, name):
    recipe = {
        "merge_method": "linear",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 1},
        word: name,
    }
    plan = mergekit.plan(recipe)
    assert {output.dtype.name for output in plan.outputs} == {DTYPES[name]}
    assert f'"torch_dtype": "{DTYPES[name]}"' in plan.config
    assert str(dtype_from_name(name)) == f"torch.{DTYPES[name]}"


@pytest.mark.parametrize(
    "name", ["int64", "floaty", "torch.", "Float16", "torch.torch.float16", " float16", "float8_e4m3fn"]
)
def test_names_of_no_dtype(name):
    with pytest.raises(RecipeError, match="no dtype"):
        load_recipe({"merge_method": "linear", "models": [{"model": "a"}], "dtype": name})


def test_out_dtype_goes_before_dtype():
    recipe = {"merge_method": "passthrough", "models": [{"model": "a"}], "dtype": "float32", "out_dtype": "float16"}
    assert {output.dtype.name for output in mergekit.plan(recipe).outputs} == {"float16"}


# References

REFERENCES = {
    "a": ModelReference(ModelPath("a")),
    "org/model@v1": ModelReference(ModelPath("org/model", "v1")),
    "org/model+org/lora": ModelReference(ModelPath("org/model"), ModelPath("org/lora")),
    "org/model@v1+org/lora@v2": ModelReference(ModelPath("org/model", "v1"), ModelPath("org/lora", "v2")),
    "/a b/c 'd' \"e\"": ModelReference(ModelPath("/a b/c 'd' \"e\"")),
    "../x/.": ModelReference(ModelPath("../x/.")),
}


@pytest.mark.parametrize("text", REFERENCES)
def test_references_as_text(text):
    assert ModelReference.parse(text) == ModelReference.model_validate(text) == REFERENCES[text]
    assert str(REFERENCES[text]) == text
    assert len({REFERENCES[text], ModelReference.parse(text)}) == 1


MAPPINGS: list[tuple[Any, ModelReference]] = [
    ({"model": "a"}, ModelReference(ModelPath("a"))),
    ({"model": "a@v"}, ModelReference(ModelPath("a", "v"))),
    ({"model": {"path": "a"}}, ModelReference(ModelPath("a"))),
    ({"model": {"path": "a", "revision": "v"}}, ModelReference(ModelPath("a", "v"))),
    ({"model": {"path": "a@b+c"}}, ModelReference(ModelPath("a@b+c"))),
    ({"model": "a", "lora": "l@w"}, ModelReference(ModelPath("a"), ModelPath("l", "w"))),
    ({"model": "a", "lora": {"path": "l"}}, ModelReference(ModelPath("a"), ModelPath("l"))),
    ({"model": "a", "lora": None}, ModelReference(ModelPath("a"))),
    ({"model": "a", "override_architecture": "X"}, ModelReference(ModelPath("a"), None, "X")),
    (PurePath("a@b"), ModelReference(ModelPath("a@b"))),
    (ModelReference(ModelPath("a")), ModelReference(ModelPath("a"))),
]


@pytest.mark.parametrize(("value", "reference"), MAPPINGS, ids=str)
def test_references_as_mappings(value, reference):
    assert ModelReference.model_validate(value) == reference


@pytest.mark.parametrize("value", [
    "", "@", "a@", "@v", "a@b@c", "a+", "+l", "a+b+c", "a+b@", 3, None, True, ["a"], {}, {"model": None}, {"model": 3},
    {"model": {"path": 3}}, {"model": {"path": ""}}, {"model": {"path": "a", "revision": 3}},
    {"model": {"revision": "v"}}, {"path": "a"}, {"model": "a", "lora": 3}, {"model": "a", "override_architecture": 3},
    {"model": "a", "x": 1}, {"model": {"path": "a", "x": 1}},
], ids=repr)  # fmt: skip
def test_what_is_no_reference(value):
    with pytest.raises(RecipeError):
        ModelReference.model_validate(value)


Name = st.text("ab/@+. '\"é", min_size=1, max_size=6)
Revision = st.text("abv1.", min_size=1, max_size=4)
Path_ = st.builds(ModelPath, Name, st.none() | Revision)
Reference = st.builds(ModelReference, Path_, st.none() | Path_, st.none() | st.just("LlamaForCausalLM"))


@given(Reference)
def test_a_reference_is_read_back_as_it_was_written(reference):
    assert ModelReference.model_validate(reference.dump()) == reference
    assert ModelReference.model_validate(yaml.safe_load(yaml.safe_dump(reference.dump()))) == reference


def test_references_that_differ_in_anything_are_different():
    texts = ["m", "m@main", "m+l", "m+k", "m@main+l"]
    assert len({ModelReference.parse(text) for text in texts}) == len(texts)


@pytest.mark.parametrize(("text", "short"), [
    ("/home/me/models/llama", "llama"), ("./runs/best", "best"), ("~/x/", "x"), ("a", "a"), ("org/model", "org/model"),
    ("org/model@v1", "org/model"), ("/home/me/base+org/lora", "base+org/lora"), ("runs/3/best", "best"),
])  # fmt: skip
def test_short_names_show_no_local_path(text, short):
    assert ModelReference.parse(text).short == short


def test_an_overridden_architecture_is_what_counts():
    write_model(Path("b"), 1, settings={"architectures": ["Strange"]})
    models = [{"model": "a"}, {"model": {"model": "b", "override_architecture": "LlamaForCausalLM"}}]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    assert mergekit.plan(recipe).warnings == ()
    recipe["models"] = [*models[::-1]]
    assert '"LlamaForCausalLM"' in mergekit.plan(recipe).config


# Writing


def test_lists_of_numbers_are_on_one_line_and_everything_else_in_blocks():
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "ties",
            "slices": [{"sources": [{"model": "a b", "layer_range": [0, 3]}]}],
            "base_model": 'x"y',
            "parameters": {
                "weight": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": "1e-5"}],
                "normalize": [True, False],
            },
            "dtype": None,
        }
    )
    assert (
        config.to_yaml()
        == """\
merge_method: ties
slices:
- sources:
  - model: a b
    layer_range: [0, 3]
base_model: x"y
parameters:
  weight:
  - filter: mlp
    value: [0, 0.5, 1]
  - value: 1e-5
  normalize:
  - true
  - false"""
    )


def test_objects_that_are_shared_are_written_out():
    shared = {"weight": [0, 1]}
    recipe = {"merge_method": "linear", "models": [{"model": m, "parameters": shared} for m in "ab"]}
    assert "&" not in load_recipe(recipe).text.text
    assert "&" not in MergeConfiguration.model_validate(recipe).to_yaml()


def test_a_configuration_says_only_what_was_said():
    assert configuration().to_yaml() == "merge_method: linear\nmodels:\n- model: a"


Scalar = st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=5)
Gradient = Scalar | st.lists(Scalar, max_size=3)
Filtered = st.fixed_dictionaries({"value": Gradient}, optional={"filter": st.none() | st.text(max_size=4)})
Parameters = st.dictionaries(
    st.text(min_size=1, max_size=5), Gradient | Filtered | st.lists(Filtered, max_size=2), max_size=2
)
Model = st.builds(lambda reference: reference.dump(), Reference)
Range = st.tuples(st.integers(0, 5), st.integers(6, 9)).map(list)
Source = st.fixed_dictionaries({"model": Model, "layer_range": Range}, optional={"parameters": Parameters})
Slice = st.fixed_dictionaries(
    {"sources": st.lists(Source, min_size=1, max_size=2)},
    optional={"parameters": Parameters, "base_model": Model, "residual_weight": st.floats(0, 1)},
)
Body = st.fixed_dictionaries({"slices": st.lists(Slice, min_size=1, max_size=2)}) | st.fixed_dictionaries(
    {
        "models": st.lists(
            st.fixed_dictionaries({"model": Model}, optional={"parameters": Parameters}), min_size=1, max_size=2
        )
    }
)
Top = st.fixed_dictionaries(
    {"merge_method": st.text(max_size=8)},
    optional={
        "base_model": st.none() | Model,
        "parameters": Parameters,
        "dtype": st.sampled_from([None, *DTYPES]),
        "tokenizer_source": st.sampled_from(["union", "base", "model:a b"]),
        "chat_template": st.text(max_size=9),
        "seed": st.integers(0, (1 << 63) - 1),
    },
)
Recipes = st.builds(
    lambda top, body, is_module: {**top, **({"modules": {"default": body}} if is_module else body)},
    Top,
    Body,
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(Recipes)
def test_a_configuration_is_read_back_as_it_was_written(recipe):
    config = MergeConfiguration.model_validate(recipe)
    text = config.to_yaml()
    assert not text.endswith("\n")
    assert MergeConfiguration.model_validate(read_recipe_text(text).value) == config
    assert MergeConfiguration.model_validate(config.model_dump()) == config
