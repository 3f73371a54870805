"""``mergekit explain``: its values are the plan's, and its places are the recipe's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import command
import mergekit
from mergekit.api.explain import explain, matching
from mergekit.errors import RecipeError, UsageError
from mergekit.planning.expression import Apply
from models import family

ROOT = Path(__file__).parent.parent
SHAPES = {
    "model.embed_tokens.weight": (13, 7),
    **{f"model.layers.{i}.{name}.weight": (7, 7) for i in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")},
    "model.norm.weight": (7,),
}
RECIPE = """\
merge_method: dare_ties
base_model: m0
models:
  - model: m1
    parameters:
      weight: [0, 1]
  - model: m2
    parameters:
      density: {filter: mlp, value: 0.25}
input_model_parameters:
  m2: {weight: 0.75}
parameters:
  density:
    - filter: self_attn
      value: [0.5, 1]
    - filter: nowhere
      value: 0.1
    - value: 0.9
  lambda: 2
  normalize: true
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 3, shapes=SHAPES)
    path = Path("r.yml")
    path.write_text(RECIPE)
    return path


def of(found, tensor: str, parameter: str) -> list[tuple]:
    return [(s.model, s.value, s.place, s.how) for s in found.of(tensor) if s.parameter == parameter]


def test_every_value_has_its_origin(recipe):
    found = explain(recipe)
    position = {source.short: number for number, source in enumerate(found.plan.sources)}
    one, two = position["m1"], position["m2"]
    q = "model.layers.1.self_attn.q_proj.weight"
    assert of(found, q, "weight") == [
        (one, 0.5, "r.yml:6:7", "gradient [0, 1] at depth 0.50"),
        (two, 0.75, "r.yml:11:8", ""),
    ]
    assert of(found, q, "density") == [
        (one, 0.75, "r.yml:15:7", "filter 'self_attn', gradient [0.5, 1] at depth 0.50"),
        (two, 0.75, "r.yml:15:7", "filter 'self_attn', gradient [0.5, 1] at depth 0.50"),
    ]
    up = "model.layers.1.mlp.up_proj.weight"
    assert of(found, up, "density") == [(one, 0.9, "r.yml:18:7", ""), (two, 0.25, "r.yml:9:30", "filter 'mlp'")]
    assert of(found, up, "lambda") == [(None, 2.0, "r.yml:19:3", "")]
    assert of(found, up, "rescale") == [(None, "l1", None, "")]
    assert found.unused == (("r.yml:17:7", "density"),)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yml")), ids=lambda p: p.name)
def test_values_are_those_of_the_plan(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = explain(path)
    assert found.plan == mergekit.plan(path)
    for output in found.plan.outputs:
        if not isinstance(output.expression, Apply):
            continue
        planned = {name.rstrip("_"): value for name, value in output.expression.parameters}
        told: dict[str, list] = {}
        for setting in found.of(output.name):
            told.setdefault(setting.parameter, []).append(setting.value)
            if setting.place is not None:
                line = path.read_text().splitlines()[int(setting.place.rsplit(":", 2)[1]) - 1]
                assert setting.parameter in line or "value" in line
        for name, value in planned.items():
            assert told[name] == (list(value) if isinstance(value, tuple) else [value])


def test_the_command(recipe):
    done = command.mergekit("explain", recipe)
    assert done.code == 0, done.err
    assert "model.layers.{n}.mlp.up_proj.weight (3 tensors)" in done.out
    assert "0 .. 1" in done.out
    assert "r.yml:17:7: no tensor takes its 'density' from here" in done.out
    assert "svc" not in done.out
    one = command.mergekit("explain", recipe, "--tensor", "model.layers.1.mlp.up_proj.weight").out
    assert "    9 |       density: {filter: mlp, value: 0.25}" in one
    assert "svc" in one
    record = json.loads(command.mergekit("explain", recipe, "--json", "--tensor", "up_proj").out)
    assert list(record["tensors"]) == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    command.assert_refused(command.mergekit("explain", recipe, "--tensor", "modl.norm.weight"), 2, "Did you mean")
    command.assert_refused(command.mergekit("explain", recipe, "--tensor", "zzz"), 2, "Without --tensor all are listed")
    command.assert_refused(command.mergekit("explain", "none.yml"), 2, "none.yml")


def test_ranges_are_those_of_all_values(recipe):
    """The first and the last tensor stand outside the layers and have the first value of a gradient."""
    recipe.write_text("merge_method: linear\nmodels: [{model: m0}, {model: m1}]\nparameters: {weight: [0.25, 1]}\n")
    done = command.mergekit("explain", recipe)
    assert re.search(r"weight +\[1\] +0\.25 \.\. 1 ", done.out), done.out
    assert "0.25 .. 0.25" not in done.out


def test_recipes_without_places(recipe):
    import yaml

    found = explain(yaml.safe_load(RECIPE))
    assert of(found, "model.norm.weight", "lambda") == [(None, 2.0, "recipe.parameters.lambda", "")]
    with pytest.raises(UsageError):
        matching(found, "zzz")
    with pytest.raises(RecipeError):
        explain({"merge_method": "none"})
