"""Parameter settings: scalars, gradients, filters, and which of several scopes gives a value."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mergekit
from files import LAYERS, write_model
from mergekit.config import evaluate_setting
from mergekit.methods.spec import Flag, ParameterError, Real
from mergekit.planning.expression import Apply
from mergekit.planning.plan import Plan

UP = "model.layers.{}.mlp.up_proj.weight"
NORM = "model.layers.{}.input_layernorm.weight"
EMBEDDING, LAST, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

Numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=7)
Depth = st.floats(0, 1)


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Work in a folder with three small models."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        write_model(Path(name), seed)


# One setting, one tensor


@given(Numbers, Depth)
def test_a_gradient_is_piecewise_linear_over_depth(values, t):
    places = np.linspace(0, 1, len(values))
    assert evaluate_setting("x", values, t) == pytest.approx(np.interp(t, places, values), rel=1e-9, abs=1e-6)


@given(Numbers)
def test_a_gradient_begins_and_ends_with_its_values(values):
    assert evaluate_setting("x", values, 0) == values[0]
    assert evaluate_setting("x", values, 1) == values[-1]
    assert evaluate_setting("x", values[:1], 0.37) == values[0]


@given(st.lists(st.booleans(), min_size=1, max_size=5), Depth)
def test_a_gradient_of_truths_is_a_staircase(values, t):
    """Never interpolated: the value of the step that the depth has reached."""
    found = evaluate_setting("x", values, t, Flag())
    assert found is values[int(np.floor(t * (len(values) - 1)))]


def test_truth_holds_until_the_very_end():
    assert [evaluate_setting("x", [True, False], t, Flag()) for t in (0, 0.5, 0.999, 1)] == [True, True, True, False]
    assert evaluate_setting("x", [1, "no", "true"], 0.5, Flag()) is False


SCALARS = [
    (Real(), 1, 1.0),
    (Real(), "1e-5", 1e-5),
    (Real(), " 2.5 ", 2.5),
    (Real(), True, 1.0),
    (Real(), [0, "1e-1"], 0.05),
    (Flag(), "false", False),
    (Flag(), "True", True),
    (Flag(), "off", False),
    (Flag(), 0, False),
    (Flag(), 1.0, True),
]


@pytest.mark.parametrize(("kind", "value", "meaning"), SCALARS)
def test_values_are_read_as_their_parameter_wants(kind, value, meaning):
    found = evaluate_setting("x", value, 0.5, kind)
    assert found == meaning
    assert type(found) is type(meaning)


@pytest.mark.parametrize(("kind", "value"), [(Real(), "abc"), (Real(), "nan"), (Real(0, 1), 2), (Flag(), "maybe"),
                                             (Flag(), 0.5), (Real(0, 1), [0, 2])])  # fmt: skip
def test_values_that_fit_no_parameter_are_refused(kind, value):
    with pytest.raises(ParameterError):
        evaluate_setting("x", value, 1, kind)


FILTERS: list[tuple[Any, str, Any]] = [
    ({"value": 1}, "any.name", 1),
    ({"value": 1, "filter": None}, "any.name", 1),
    ({"value": 1, "filter": "*"}, "any.name", 1),
    ({"value": 1, "filter": ""}, "any.name", 1),
    ({"value": 1, "filter": "mlp"}, "model.layers.0.mlp.up_proj.weight", 1),
    ({"value": 1, "filter": "mlp"}, "model.layers.0.self_attn.q_proj.weight", None),
    ({"value": 1, "filter": "MLP"}, "model.layers.0.mlp.up_proj.weight", None),
    ({"value": 1, "filter": "layers.1."}, "model.layers.11.mlp.up_proj.weight", None),
    ({"value": 1, "filter": "m.p"}, "model.layers.0.mlp.up_proj.weight", None),
    ({"value": 1, "filter": "mlp*"}, "model.layers.0.mlp.up_proj.weight", None),
    ([{"value": 1, "filter": "mlp"}, {"value": 2}], "model.layers.0.mlp.up_proj.weight", 1),
    ([{"value": 1, "filter": "mlp"}, {"value": 2}], "lm_head.weight", 2),
    ([{"value": 2}, {"value": 1, "filter": "mlp"}], "model.layers.0.mlp.up_proj.weight", 2),
    ([{"value": 1, "filter": "mlp"}, {"value": 2, "filter": "up"}], "model.layers.0.mlp.up_proj.weight", 1),
    ([{"value": 1, "filter": "mlp"}, {"value": 2, "filter": "norm"}], "lm_head.weight", None),
    ([{"value": [0, 1], "filter": "mlp"}], "model.layers.0.mlp.up_proj.weight", 0.25),
    ([{"value": [], "filter": "mlp"}, {"value": 1}], "model.layers.0.mlp.up_proj.weight", None),
    ([], "any.name", None),
]


@pytest.mark.parametrize(("setting", "tensor", "meaning"), FILTERS)
def test_filters_are_parts_of_names_and_the_first_that_fits_counts(setting, tensor, meaning):
    assert evaluate_setting(tensor, setting, 0.25) == meaning


# Many tensors


def values(plan: Plan, tensor: str) -> dict[str, Any]:
    """The parameters that were resolved for one output tensor."""
    expression = next(output.expression for output in plan.outputs if output.name == tensor)
    assert isinstance(expression, Apply)
    return {name.rstrip("_"): value for name, value in expression.parameters}


def linear(**parameters: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": parameters}


def test_depth_runs_from_the_first_layer_to_the_last():
    plan = mergekit.plan(linear(weight=[1, 3]))
    assert [values(plan, UP.format(k))["weight"] for k in range(LAYERS)] == [(1, 1), (2, 2), (3, 3)]


def test_tensors_outside_the_layers_are_at_the_beginning():
    plan = mergekit.plan(linear(weight=[1, 3]))
    assert [values(plan, name)["weight"] for name in (EMBEDDING, LAST, HEAD)] == [(1, 1)] * 3


def slice_of(**ranges: list[int]) -> dict[str, Any]:
    return {"sources": [{"model": model, "layer_range": place} for model, place in ranges.items()]}


def test_depth_begins_anew_in_each_slice_and_a_lone_layer_is_at_the_end():
    recipe = {
        "merge_method": "linear",
        "slices": [slice_of(a=[0, 3], b=[0, 3]), slice_of(a=[1, 3], b=[0, 2]), slice_of(a=[0, 1], b=[2, 3])],
        "parameters": {"weight": [1, 3]},
    }
    plan = mergekit.plan(recipe)
    assert [values(plan, UP.format(k))["weight"][0] for k in range(6)] == [1, 2, 3, 1, 3, 3]
    assert [values(plan, name)["weight"][0] for name in (EMBEDDING, LAST, HEAD)] == [1, 1, 1]


def test_filters_of_a_model_see_its_own_names_and_shared_ones_the_output_s():
    weight = [{"filter": "layers.2.", "value": 5}, {"value": 1}]
    recipe = {
        "merge_method": "linear",
        "slices": [slice_of(a=[0, 1], b=[2, 3]), slice_of(a=[2, 3], b=[0, 1])],
        "parameters": {"weight": weight, "normalize": [{"filter": "layers.1.", "value": False}]},
    }
    plan = mergekit.plan(recipe)
    assert values(plan, UP.format(0)) == {"weight": (1, 5), "normalize": True}
    assert values(plan, UP.format(1)) == {"weight": (5, 1), "normalize": False}


PRECEDENCE = {
    ("slices", 0, "sources", 0, "parameters"): 1,
    ("slices", 0, "parameters"): 2,
    ("input_model_parameters", "a"): 3,
    ("modules", "default", "parameters"): 4,
    ("parameters",): 5,
}
"""Every place for a model's parameter, the one that counts first."""


def scoped(places: dict[tuple[Any, ...], Any], name: str) -> dict[str, Any]:
    """A recipe with parameter ``name`` set at ``places``."""
    module: dict[str, Any] = {"slices": [slice_of(a=[0, 3], b=[0, 3])]}
    recipe: dict[str, Any] = {"merge_method": "linear", "modules": {"default": module}}
    for path, value in places.items():
        node: Any = module if path[0] == "slices" else recipe
        for step in path:
            node = node[step] if isinstance(node, list) else node.setdefault(step, {})
        node[name] = value
    return recipe


def test_the_narrowest_scope_gives_the_value():
    places: dict[Any, Any] = dict(PRECEDENCE)
    for path, value in PRECEDENCE.items():
        assert (
            values(mergekit.plan(scoped({**places, ("parameters",): 5}, "weight")), UP.format(0))["weight"][0] == value
        )
        del places[path]


def test_a_scope_whose_filters_do_not_fit_passes_on_to_the_next():
    for path, value in PRECEDENCE.items():
        places: dict[Any, Any] = {
            other: number if number >= value else {"filter": "nothing", "value": 9}
            for other, number in PRECEDENCE.items()
        }
        assert values(mergekit.plan(scoped(places, "weight")), UP.format(0))["weight"][0] == value, path


@pytest.mark.parametrize("empty", [[], {"filter": "nothing", "value": 9}, {"value": []}])
def test_a_setting_without_value_leaves_it_to_the_next_scope(empty):
    plan = mergekit.plan(scoped({("slices", 0, "parameters"): empty, ("parameters",): 5}, "weight"))
    assert values(plan, UP.format(0))["weight"] == (5, 5)


def test_models_parameters_go_before_those_of_all():
    recipe = linear(weight=7)
    recipe["models"][0]["parameters"] = {"weight": {"filter": "mlp", "value": 2}}
    plan = mergekit.plan(recipe)
    assert values(plan, UP.format(0))["weight"] == (2, 7)
    assert values(plan, NORM.format(0))["weight"] == (7, 7)


def test_parameters_by_model_are_the_same_as_under_the_model():
    by_model = {**linear(weight=7), "input_model_parameters": {"b": {"weight": [0, 2]}}}
    under = linear(weight=7)
    under["models"][1]["parameters"] = {"weight": [0, 2]}
    assert mergekit.plan(by_model).outputs == mergekit.plan(under).outputs


@pytest.mark.parametrize(("name", "nothing"), [("weight", 0), ("normalize", False)])
def test_zero_and_false_are_values(name, nothing):
    """They hide what a wider scope says."""
    places = {("slices", 0, "parameters"): nothing, ("parameters",): 1}
    recipe = scoped(places, name)
    recipe["parameters"] = {"weight": 1, **recipe["parameters"], "normalize": False, name: 1}
    found = values(mergekit.plan(recipe), UP.format(0))[name]
    assert found == ((0, 0) if name == "weight" else False)


def test_a_shared_parameter_is_read_from_slices_modules_and_the_top():
    paths = [("slices", 0, "parameters"), ("modules", "default", "parameters"), ("parameters",)]
    for i in range(3):
        places = {path: (j != i) for j, path in enumerate(paths) if j >= i}
        recipe = scoped(places, "normalize")
        recipe.setdefault("parameters", {})["weight"] = 1
        assert values(mergekit.plan(recipe), UP.format(0))["normalize"] is False


def test_defaults_stand_where_nothing_is_said():
    assert values(mergekit.plan(linear(weight=1)), UP.format(0)) == {"weight": (1, 1), "normalize": True}


def test_a_parameter_that_only_some_tensors_get_is_missing_for_the_others():
    with pytest.raises(mergekit.MergekitError, match=r"needs 'weight' for a \(tensor model\.embed_tokens\.weight\)"):
        mergekit.plan(linear(weight={"filter": "mlp", "value": 1}))


@pytest.mark.parametrize(("given", "words"), [
    ([], "an empty list"), ({"value": []}, "an empty list"), ([{"value": [], "filter": "embed"}], "an empty list"),
    ({"filter": "mlp", "value": 1}, "has filters that leave it out"),
])  # fmt: skip
def test_a_setting_that_gives_no_value_is_not_called_missing(given, words):
    with pytest.raises(mergekit.MergekitError, match=f"embed_tokens.weight.; what is given .*{words}$"):
        mergekit.plan(linear(weight=given))


# What is not read is said


def ties(**under_b: Any) -> dict[str, Any]:
    models = [{"model": "a"}, {"model": "b", "parameters": {"weight": 1, **under_b}}]
    return {"merge_method": "ties", "base_model": "a", "models": models}


def test_a_shared_parameter_under_a_model_is_ignored_with_a_warning_that_says_where_it_belongs():
    plan = mergekit.plan(ties(normalize=False))
    assert plan.warnings == (
        "recipe.models.1.parameters.normalize: 'normalize' is one value for all models and is not read here; "
        "move it to the top-level 'parameters' (ignored)",
    )
    assert values(plan, UP.format(0))["normalize"] is True


def test_parameters_of_the_base_are_ignored_with_a_warning():
    recipe = ties()
    recipe["models"][0]["parameters"] = {"weight": 3}
    plan = mergekit.plan(recipe)
    assert len(plan.warnings) == 1
    assert "'weight' of the base model is not used by 'ties' (ignored)" in plan.warnings[0]
    assert values(plan, UP.format(0))["weight"] == (1,)


def test_parameters_of_another_method_are_ignored_with_a_warning():
    plan = mergekit.plan(ties(t=0.5))
    assert plan.warnings == (
        "recipe.models.1.parameters.t: 'ties' has no parameter 't' (it belongs to slerp, nearswap); ignored",
    )


def test_the_same_remark_is_made_once():
    recipe = linear(weight=1)
    recipe["models"] = [{"model": name, "parameters": {"t": 0.5, "int8_mask": True}} for name in "abc"]
    plan = mergekit.plan(recipe)
    assert len(plan.warnings) == len(plan.notes) == 1
    assert plan.warnings[0].startswith("recipe.models.0.parameters.t: ")
    assert plan.warnings[0].endswith("(and at 2 more places)")


@pytest.mark.parametrize("scope", ["top", "model"])
@pytest.mark.parametrize("method", ["ties", "linear"])
def test_words_without_effect_are_noted(scope, method):
    recipe = {**ties(), "merge_method": method, "parameters": {"weight": 1}}
    (recipe["parameters"] if scope == "top" else recipe["models"][1]["parameters"])["int8_mask"] = True
    plan = mergekit.plan(recipe)
    assert len(plan.notes) == 1
    assert "'int8_mask' changes nothing" in plan.notes[0]
    plain = copy.deepcopy(recipe)
    for parameters in (plain["parameters"], plain["models"][1]["parameters"]):
        parameters.pop("int8_mask", None)
    assert mergekit.plan(plain).outputs == plan.outputs


def test_residual_weight_is_noted():
    recipe = {"merge_method": "passthrough", "slices": [{**slice_of(a=[0, 3]), "residual_weight": 0.5}]}
    assert mergekit.plan(recipe).notes == ("recipe.slices.0.residual_weight: 'residual_weight' changes nothing",)
