"""Recipes and folders that can't be used: refused through the command line, in a few lines that name place and remedy.

Exit code 2: what the recipe or the command says. Exit code 1: what is wrong with files or the machine. Nothing is ever
half-written, and no traceback reaches the user. (Damaged weight files: test_hostile_files.)
"""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from command import assert_refused, mergekit, mergekit_yaml, refusal, warm_up
from files import LAYERS, llama, read_safetensors, to_float, write_model, write_recipe
from mergekit.errors import ModelNotFoundError
from mergekit.recipe import load_recipe

RECIPE = """
merge_method: linear
models:
- model: a
  parameters: {weight: 1}
- model: b
  parameters: {weight: 1}
"""
SLICES = """
merge_method: passthrough
slices:
- sources:
  - model: a
    layer_range: """


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Work in a folder with two small models, ``a`` and ``b``."""
    warm_up()
    monkeypatch.chdir(tmp_path)
    write_model(Path("a"), 1)
    write_model(Path("b"), 2)


def refused(text: str | bytes, code: int, *phrases: str) -> None:
    """Merging the recipe ``text`` is refused, by the merge and by the plan, and no output folder appears."""
    path = Path("r.yml")
    path.write_bytes(text) if isinstance(text, bytes) else write_recipe(path, text)
    assert_refused(mergekit_yaml(path, "out"), code, *phrases)
    assert not Path("out").exists()
    assert_refused(mergekit("plan", path), code, *phrases)


WORDS = {
    "unknown method": (RECIPE.replace("linear", "linaer"), "r.yml:1:1: ", "Did you mean 'linear'?"),
    "no method": (RECIPE.replace("merge_method: linear", ""), "'merge_method' is missing"),
    "method not text": (RECIPE.replace("linear", "5"), "r.yml:1:1: ", "expected text, got 5"),
    "method empty": (RECIPE.replace("linear", ""), "r.yml:1:1: ", "expected text, got nothing"),
    "unknown parameter": (RECIPE.replace("weight", "wieght", 1), "r.yml:4:16: ", "Did you mean 'weight'?"),
    "unknown key": (RECIPE + "dtyp: float16", "r.yml:7:1: ", "Did you mean 'dtype'?"),
    "unknown key, nothing near": (RECIPE + "zzz: 1", "r.yml:7:1: ", "Valid: base_model, base_quantization, "),
    "unknown key of a model": (RECIPE.replace("parameters", "params", 1), "r.yml:4:3: ", "Did you mean 'parameters'?"),
    "unknown key of a slice": (SLICES + "[0, 1]\n  weight: 3", "r.yml:6:3: ", "put it under 'parameters'"),
    "unknown key of a source": (SLICES + "[0, 1]\n    layer-range: 3", "r.yml:6:5: ", "Did you mean 'layer_range'?"),
    "models and slices": (RECIPE + "slices:\n- sources:\n  - {model: a, layer_range: [0, 1]}", "keep one of them"),
    "nothing to merge": ("merge_method: linear", "give 'models' or 'slices'"),
    "empty models": ("merge_method: linear\nmodels: []", "give 'models' or 'slices'"),
    "models is text": ("merge_method: linear\nmodels: a", "r.yml:2:1: ", "expected a list, got 'a'"),
    "models is a mapping": ("merge_method: linear\nmodels: {a: 1}", "r.yml:2:1: ", "expected a list"),
    "a parameter beside its model": (
        "merge_method: ties\nmodels:\n  - model: a\n    density: 0.5", "r.yml:4:5: ", "put it under 'parameters'"
    ),
    "a parameter of no method beside its model": (
        "merge_method: ties\nmodels:\n  - model: a\n    dens: 0.5", "r.yml:4:5: ", "there is no 'dens' here"
    ),
    "a parameter of all models beside them": ("merge_method: slerp\nmodels: [{model: a}]\nt: 1", "r.yml:3:1: ",
                                              "'t' is a parameter; put it under 'parameters'"),
    "a forgotten colon": ("merge_method: linear\nmodels:\n  - model models/a", "r.yml:3:5: ", "'model: models/a'"),
    "a tab": ("merge_method: linear\nmodels:\n\t- model: a", "r.yml:3:1: ", "a tab", "indent with spaces"),
    "a tab below spaces": ("a:\n  b: 1\n\tc: 2", "r.yml:3:1: ", "a tab", "indent with spaces"),
    "models of bare names": ("merge_method: linear\nmodels: [a, b]", "r.yml:2:10: ", "write 'model: a'"),
    "slices is a number": ("merge_method: linear\nslices: 3", "r.yml:2:1: ", "expected a list, got 3"),
    "slice is a number": ("merge_method: linear\nslices:\n- 3", "r.yml:3:3: ", "expected a mapping, got 3"),
    "no sources": ("merge_method: linear\nslices:\n- sources: []", "r.yml:3:3: ", "at least one entry"),
    "modules is a list": ("merge_method: linear\nmodules: [x]", "r.yml:2:1: ", "expected a mapping"),
    "empty module": ("merge_method: linear\nmodules: {x: {}}", "r.yml:2:11: ", "one of 'slices' and 'models'"),
    "parameters is a list": (RECIPE + "parameters: [weight]", "r.yml:7:1: ", "expected a mapping"),
    "model is a number": (RECIPE.replace("model: b", "model: 3"), "r.yml:5:3: ", "expected a model", "got int"),
    "model is empty": (RECIPE.replace("model: b", "model: "), "r.yml:5:3: ", "expected a model", "got nothing"),
    "model is a list": (RECIPE.replace("model: b", "model: [b]"), "r.yml:5:3: ", "expected a model", "got list"),
    "two revisions": (RECIPE.replace("model: b", "model: b@1@2"), "r.yml:5:3: ", "not a model reference"),
    "empty revision": (RECIPE.replace("model: b", "model: b@"), "r.yml:5:3: ", "not a model reference"),
    "two adapters": (RECIPE.replace("model: b", "model: b+c+d"), "r.yml:5:3: ", "at most one +adapter"),
    "empty adapter": (RECIPE.replace("model: b", "model: b+"), "r.yml:5:3: ", "not a model reference"),
    "unknown key of a reference": (RECIPE.replace("model: b", "model: {model: b, revison: x}"), "no key 'revison'"),
    "revision is a number": (RECIPE.replace("model: b", "model: {model: {path: b, revision: 3}}"), "needs quotes"),
    "architecture is a number": (
        RECIPE.replace("model: b", "model: {model: b, override_architecture: 3}"), "name of an architecture",
    ),
    "model twice": (RECIPE.replace("model: b", "model: a"), "r.yml:5:3: ", "listed twice"),
    "missing base": ("merge_method: slerp\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}", "'base_model'"),
    "too few models": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}]\nparameters: {t: 0.5}", "takes 2", "gives 1",
    ),
    "too many models": ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", "takes 1", "gives 2"),
    "base not in the slice": (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nslices:\n- sources:\n"
        "  - {model: b, layer_range: [0, 1]}\n  - {model: c, layer_range: [0, 1]}",
        "r.yml:5:3: ", "'a' is not among the sources",
    ),
    "missing weight": (RECIPE.replace("  parameters: {weight: 1}\n", "", 1), "needs 'weight' for a", "give it under"),
    "missing t": ("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]", "needs 't'", "give it under"),
    "weights sum to zero": (RECIPE.replace("1}", "-1}", 1), "sum to zero", "normalize: false"),
    "weights sum to zero at the end": (RECIPE.replace("1}", "[1, -1]}", 1), "sum to zero", "layers.2"),
    "dtype": (RECIPE + "dtype: floaty", "r.yml:7:1: ", "no dtype 'floaty'", "Valid: bfloat16"),
    "out_dtype": (RECIPE + "out_dtype: int64", "r.yml:7:1: ", "no dtype 'int64'", "Valid: bfloat16"),
    "dtype is a number": (RECIPE + "dtype: 16", "r.yml:7:1: ", "expected text, got 16"),
    "base is a number": (RECIPE + "base_model: 5", "r.yml:7:1: ", "expected a model"),
    "tokenizer is a number": (RECIPE + "tokenizer: 3", "r.yml:7:1: ", "expected a mapping"),
    "tokenizer_source is a number": (RECIPE + "tokenizer_source: 3", "r.yml:7:1: ", "union, base or a model"),
    "both tokenizer words": (RECIPE + "tokenizer_source: base\ntokenizer: {source: base}", "keep one of them"),
    "chat_template is a number": (RECIPE + "chat_template: 3", "r.yml:7:1: ", "expected text"),
    "negative seed": (RECIPE + "seed: -1", "r.yml:7:1: ", "'seed'"),
    "seed is true": (RECIPE + "seed: true", "r.yml:7:1: ", "expected a whole number"),
    "parameters of another model": (
        RECIPE + "input_model_parameters: {c: {weight: 1}}", "r.yml:7:26: ", "'c' is not a model of this recipe",
    ),
    "parameters of no reference": (RECIPE + "input_model_parameters: {'a@': {weight: 1}}", "r.yml:7:26: "),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_words_of_a_recipe(case):
    text, *phrases = WORDS[case]
    refused(text, 2, *phrases)


RANGES = {
    "[0, 9]": "beyond a, with 3 layers",
    f"[1, {LAYERS + 1}]": "beyond a, with 3 layers",
    "[0, 99999999999999999999]": "beyond a",
    "[2, 1]": "empty or negative",
    "[1, 1]": "empty or negative",
    "[-1, 1]": "empty or negative",
    "[0, 1.5]": "expected a whole number, got 1.5",
    "[a, b]": "expected a whole number, got 'a'",
    "[true, 2]": "expected a whole number, got True",
    "[0]": "expected two numbers",
    "[]": "expected two numbers",
    "[0, 1, 2]": "expected two numbers",
    "3": "expected two numbers",
    "{start: 0, end: 1}": "expected two numbers",
    "": "expected two numbers, [first, one past the last], got nothing",
}


@pytest.mark.parametrize("text", RANGES)
def test_layer_ranges(text):
    refused(SLICES + text, 2, "r.yml:5:", RANGES[text])


def test_a_source_without_layer_range():
    refused(SLICES.rstrip().removesuffix("layer_range:"), 2, "r.yml:4:5: ", "'layer_range' is missing")


def test_slices_of_unequal_length():
    more = "\n  - model: b\n    layer_range: [0, 1]\nparameters: {weight: 1}"
    refused(SLICES.replace("passthrough", "linear") + "[0, 2]" + more, 2, "r.yml:7:5: ", "has 1 layers", "has 2")


VALUES = {
    "null": (None, "got nothing (null)"),
    "": (None, "got nothing (null)"),
    "abc": (None, "expected a number, got 'abc'"),
    ".nan": (None, "expected a finite number, got nan"),
    "'nan'": (None, "expected a finite number, got nan"),
    "-.inf": (None, "expected a finite number, got -inf"),
    "1e999": (None, "expected a finite number, got inf"),
    "[1, .inf]": (28, "expected a finite number, got inf"),
    "[0.5, 1, nan]": (33, "expected a finite number, got nan"),
    "{value: [1, .nan], filter: mlp}": (36, "expected a finite number, got nan"),
    "[{value: 1, filter: mlp}, {value: .inf}]": (51, "expected a finite number, got inf"),
    "9" * 400: (None, "too large a number"),
    "9" * 5000: (None, "can't be read as int"),
    "[1, [2]]": (28, "a list of scalars, not of lists"),
    "[1, null]": (28, "got nothing (null)"),
    "[{value: 1}, 3]": (37, "not both"),
    "{value: 1, filtre: x}": (35, "no key 'filtre'"),
    "{filter: x}": (None, "needs the key 'value'"),
    "{value: 1, filter: 3}": (35, "a filter is text"),
    "{value: {value: 1}}": (25, "a scalar or a list of scalars"),
    "{value: null}": (25, "got nothing (null)"),
    "2001-01-01": (None, "got date"),
    "!!binary aGVsbG8=": (None, "got bytes"),
    "!!set {x}": (None, "got set"),
}


@pytest.mark.parametrize("value", VALUES, ids=lambda v: v[:40] or "nothing")
def test_values_of_a_parameter(value):
    column, phrase = VALUES[value]
    place = f"r.yml:4:{column}: " if column else "r.yml:4:"
    refused(RECIPE.replace("weight: 1}", f"weight: {value}}}", 1), 2, place, phrase)


@pytest.mark.parametrize("value", ["maybe", "2", "[true, 2]", "0.5", "{value: x}"])
def test_values_of_a_switch(value):
    refused(RECIPE + f"parameters: {{normalize: {value}}}", 2, "r.yml:7:", "expected true or false")


@pytest.mark.parametrize("text", ["1e-5", "'1e-5'", "1.0e-5", "+1", "true", "'2'"])
def test_numbers_that_yaml_takes_for_text_are_numbers(text):
    write_recipe(Path("r.yml"), RECIPE.replace("weight: 1}", f"weight: {text}}}", 1))
    assert mergekit("plan", "r.yml").code == 0


def aliases(line: str) -> str:
    """A recipe in which each line names the one before it several times, by ``line`` with {i} and {j}."""
    return "a0: &a0 {x: 1}\n" + "".join(line.format(i=i + 1, j=i) + "\n" for i in range(40))


YAML = {
    "tab": (RECIPE.replace("  parameters", "\tparameters"), "r.yml:4:1: ", "tab"),
    "unclosed bracket": (RECIPE + "parameters: {normalize: [true\n", "begun at 7:25"),
    "unclosed brace": (RECIPE + "parameters: {normalize: true\n", "begun at 7:13"),
    "unclosed quote": (RECIPE + "dtype: 'float16\n", "begun at 7:8"),
    "undefined alias": (RECIPE + "base_model: *nope\n", "r.yml:7:13: ", "undefined alias"),
    "two documents": (RECIPE + "---\n" + RECIPE, "r.yml:7:1: ", "another document"),
    "billion laughs": (aliases("a{i}: &a{i} [*a{j}, *a{j}, *a{j}, *a{j}]"), "aliases make this recipe enormous"),
    "billion laughs by merging": (aliases("a{i}: &a{i}\n  <<: [*a{j}, *a{j}]"), "aliases make this recipe enormous"),
    "deep aliases": (aliases("a{i}: &a{i} [*a{j}]"), "nested too deeply"),
    "a list in itself": ("a: &a [*a]", "r.yml:1:4: ", "contains itself"),
    "a mapping in itself": ("a: &a {b: *a}", "r.yml:1:4: ", "contains itself"),
    "merged into itself": ("a: &a\n  <<: *a", "contains itself"),
    "deep brackets": ("[" * 200_000, "r.yml:1:33: ", "nested too deeply"),
    "deep braces": ("{a: " * 100_000, "nested too deeply"),
    "deep and closed": ("a: " + "[" * 50 + "]" * 50, "nested too deeply"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(2000)), "nested too deeply"),
    "many entries": ("a: [" + "1," * 1_000_000 + "]", "too many for a recipe"),
    "large": ("# " + "x" * 5_000_000, "too much for a recipe"),
    "a list at the top": ("- a\n- b", "r.yml:1:1: ", "a recipe is a mapping"),
    "text at the top": ("just text", "r.yml:1:1: ", "a recipe is a mapping"),
    "only a comment": ("# nothing yet", "the recipe is empty"),
    "null": ("---\n...\n", "the recipe is empty"),
    "a list as key": (RECIPE + "? [1, 2]\n: 3", "r.yml:7:3: ", "a key must be text"),
    "a number as key": (RECIPE + "1: 3", "r.yml:7:1: ", "write '1' in quotes"),
    "yes as key": (RECIPE + "yes: 3", "r.yml:7:1: ", "write 'yes' in quotes"),
    "null as key": (RECIPE + "null: 3", "r.yml:7:1: ", "write 'null' in quotes"),
    "impossible date": (RECIPE + "dtype: 2001-99-99", "r.yml:7:8: ", "put text in quotes"),
    "impossible number": (RECIPE + "dtype: !!int abc", "r.yml:7:8: ", "can't be read as int"),
    "impossible truth": (RECIPE + "dtype: !!bool maybe", "r.yml:7:8: ", "can't be read as bool"),
    "impossible time": (RECIPE + "dtype: !!timestamp abc", "r.yml:7:8: ", "can't be read as timestamp"),
    "code": (RECIPE + "x: !!python/object/apply:os.system ['touch marker']", "r.yml:7:4: ", "constructor"),
    "surrogate": (RECIPE + 'dtype: "\\ud800"', "r.yml:7:11: ", "Unicode"),
    "terminal controls": (RECIPE + '"x\\e[31m": 1', "there is no 'x\\x1b[31m' here"),
    "not UTF-8": (b"merge_method: \xff\xfe", "not UTF-8"),
    "UTF-16": (RECIPE.encode("utf-16"), "not UTF-8"),
    "a nul": (b"merge_method: \x00", "not valid YAML"),
    "nothing": (b"", "the recipe is empty"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml(case):
    text, *phrases = YAML[case]
    refused(text, 2, "r.yml", *phrases)
    assert not Path("marker").exists()


def test_duplicate_keys_are_warned_of_and_the_last_counts():
    write_recipe(
        Path("r.yml"), RECIPE.replace("weight: 1}", "weight: 1, weight: 2}", 1) + "dtype: float16\ndtype: float32"
    )
    result = mergekit("plan", "r.yml")
    assert result.lines("warning") == [
        "warning: r.yml:4:27: 'weight' is given twice; the last one counts",
        "warning: r.yml:8:1: 'dtype' is given twice; the last one counts",
    ]
    assert "weight=(2, 1)" in result.out
    assert "float32" in result.out


@pytest.mark.parametrize("prefix", [b"\xef\xbb\xbf", b"---\n", b"%YAML 1.1\n---\n"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_byte_order_marks_and_foreign_line_ends_are_fine(prefix, newline):
    Path("r.yml").write_bytes(prefix + RECIPE.strip().encode().replace(b"\n", newline))
    assert mergekit("plan", "r.yml").code == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@,?\n\t 0.", max_size=40), st.integers(0, len(RECIPE)), st.integers(0, 20))
def test_a_recipe_with_any_damage_is_read_or_refused(junk, at, cut):
    Path("r.yml").write_text(RECIPE[:at] + junk + RECIPE[at + cut :], newline="")
    fault = refusal(load_recipe, Path("r.yml"))
    if fault is not None:
        assert fault.exit_code == 2
        assert "r.yml" in str(fault)


@pytest.mark.parametrize(("args", "phrase"), [
    (["nowhere.yml", "out"], "nowhere.yml: cannot read the recipe: No such file"),
    (["a", "out"], "a: this is a model's folder, and a recipe is a file; `mergekit inspect a` shows what the model is"),
    (["new", "out"], "new: this is a folder, and a recipe is a file; `mergekit new` writes one"),
    (["new", "r.yml"], "r.yml is a file; the recipe comes first, then the folder for the output: mergekit merge r.yml"),
    (["/dev/null", "out"], "the recipe is empty"),
    (["/dev/zero", "out"], "too much for a recipe"),
])  # fmt: skip
def test_recipes_that_are_no_files(args, phrase):
    Path("new").mkdir()
    Path("r.yml").write_text(RECIPE)
    assert_refused(mergekit_yaml(*args), 2, phrase)
    assert not Path("out").exists()


@pytest.mark.parametrize("spelt", ["models/code", "./models/code", "models/code+adapter"])
def test_paths_of_a_recipe_that_is_elsewhere(spelt, monkeypatch):
    """The folder is beside the recipe and not here: that is said, and no hub is asked."""
    monkeypatch.setattr("mergekit.hub.open_repository", lambda *args, **options: pytest.fail("the hub was asked"))
    shutil.copytree("a", "work/models/code")
    shutil.copytree("a", "work/models/code2")
    Path("work/mine.yml").write_text(RECIPE.replace("model: b", f"model: {spelt}").replace("model: a", "model: org/x"))
    refusal = mergekit("plan", "work/mine.yml")
    phrases = ("work/mine.yml:6:3: no folder '", "but 'work/models/code' is there", "run the command in work")
    assert_refused(refusal, 2, *phrases)
    Path("work/mine.yml").write_text(RECIPE.replace("model: b", "model: models/no").replace("model: a", "model: x/y"))
    monkeypatch.setattr("mergekit.hub.open_repository", refuse)
    refusal = mergekit("plan", "work/mine.yml")
    assert_refused(refusal, 2, "there is no folder 'x/y' in the current folder, and")


def refuse(path, **options):
    raise ModelNotFoundError(f"there is no model '{path}' on the hub")


@pytest.mark.parametrize("args", ["inspect r.yml", "verify r.yml", "diff a r.yml", "report r.yml"])
def test_recipes_for_models(args):
    Path("r.yml").write_text(RECIPE)
    refusal = mergekit(*args.split())
    assert_refused(refusal, 2, "'r.yml' is a file, and a model is a folder; `mergekit plan r.yml` shows what a recipe")


def test_a_report_of_what_was_not_merged():
    assert_refused(mergekit("report", "a"), 2, "it was not merged by mergekit", "`mergekit inspect a` shows what it is")


# Models


MODELS = {
    "no such folder": ("model: ./nowhere", "no folder 'nowhere'", "give the path of a model folder"),
    "no such path": ("model: /nowhere/at/all", "no folder '/nowhere/at/all'", "give the path"),
    "a file": ("model: ./a/config.json", "'a/config.json' is a file, and a model is a folder", "give the path"),
    "an empty folder": ("model: ./empty", "empty: no model.safetensors", "it holds no weights"),
    "other weights": ("model: ./odd", "no model.safetensors", "found x.safetensors, y.safetensors"),
    "a missing shard": ("model: ./torn", "1 of 2 shards are missing, first model-00002-of-00002", "download the model"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_are_not_there(case):
    Path("empty").mkdir()
    Path("odd").mkdir()
    for name in ("x.safetensors", "y.safetensors"):
        shutil.copy("a/model.safetensors", Path("odd", name))
    shutil.copytree("a", "torn")
    names = list(llama(1))
    shards = {name: f"model-0000{1 + (i > 4)}-of-00002.safetensors" for i, name in enumerate(names)}
    Path("torn/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    Path("torn/model.safetensors").rename("torn/model-00001-of-00002.safetensors")
    text, *phrases = MODELS[case]
    refused(RECIPE.replace("model: b", text), 2, "r.yml:5:3: ", *phrases)


def test_models_of_different_shapes():
    write_model(Path("b"), 2, intermediate=17)
    refused(RECIPE, 2, "model.layers.0.mlp.up_proj.weight", "shapes differ", "[13, 7]", "[17, 7]", "fine-tuned from")


def test_models_of_different_depth():
    write_model(Path("b"), 2, layers=2)
    refused(RECIPE, 2, "r.yml:5:3: ", "b has 2 layers, but a has 3", "use 'slices'")


def test_models_of_different_architecture():
    write_model(Path("b"), 2, settings={"architectures": ["MistralForCausalLM"]})
    refused(RECIPE, 2, "b is a MistralForCausalLM, but a is a LlamaForCausalLM", "--allow-crimes")


@pytest.mark.parametrize("value", [5, "LlamaForCausalLM", {"a": 1}, [3], [None]])
def test_a_config_with_nonsense_for_architectures(value):
    write_model(Path("b"), 2, settings={"architectures": value})
    refused(RECIPE, 1, "b/config.json: 'architectures' is not a list of names")


@pytest.mark.parametrize("text", ["{", "[]", '{"a": "\xff"}', "[" * 100_000, ""])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_small_files_that_are_no_json_objects(name, text):
    Path("b", name).write_bytes(text.encode("latin-1"))
    refused(RECIPE, 1, f"b/{name}: ", "download it again")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
class TestNonFinite:
    """Computed tensors must be finite; copies are only remarked on."""

    @pytest.fixture(autouse=True)
    def _bad(self, bad):
        tensors = llama(3, code="F32")
        tensors["model.norm.weight"][1][3] = bad
        write_model(Path("c"), tensors=tensors)

    def test_a_computed_tensor_stops_the_merge(self):
        write_recipe(Path("r.yml"), RECIPE.replace("model: b", "model: c"))
        result = mergekit_yaml("r.yml", "out")
        assert_refused(result, 1, "model.norm.weight", "NaN or infinity", "--allow-nonfinite")
        assert not Path("out").exists()

    def test_unless_told_otherwise(self, bad):
        write_recipe(Path("r.yml"), RECIPE.replace("model: b", "model: c"))
        result = mergekit_yaml("r.yml", "out", "--allow-nonfinite", "--quiet")
        assert result.code == 0
        assert result.lines() == ["warning: model.norm.weight came out with NaN or infinity (--allow-nonfinite)"]
        merged = to_float(read_safetensors(Path("out/model.safetensors"))["model.norm.weight"])
        assert np.isfinite(merged).tolist() == [i != 3 for i in range(7)]
        assert np.array_equal(merged[3], bad, equal_nan=True)

    def test_a_copy_is_remarked_on(self):
        write_recipe(Path("r.yml"), "merge_method: passthrough\nmodels: [{model: c}]")
        result = mergekit_yaml("r.yml", "out", "--quiet")
        assert result.code == 0
        assert result.lines() == ["warning: model.norm.weight is a copy of a tensor that holds NaN or infinity"]
        assert Path("out/model.safetensors").read_bytes()[-868:] == Path("c/model.safetensors").read_bytes()[-868:]

    @pytest.mark.parametrize("method", ["slerp", "task_arithmetic", "ties", "dare_ties", "dare_linear"])
    @pytest.mark.parametrize("base", ["a", "c"])
    def test_every_method_sees_it(self, method, base):
        other = "c" if base == "a" else "b"
        write_recipe(
            Path("r.yml"),
            f"""
merge_method: {method}
base_model: {base}
models:
- model: {base}
- model: {other}
  parameters: {{weight: 0.5, density: 0.5}}
parameters: {{t: 0.5}}
""",
        )
        assert_refused(mergekit_yaml("r.yml", "out"), 1, "model.norm.weight", "NaN")
        assert not Path("out/model.safetensors").exists()


def test_float16_overflow_names_the_remedy():
    tensors = llama(3, code="F32")
    tensors["model.norm.weight"][1][3] = 1e9
    write_model(Path("c"), tensors=tensors)
    write_recipe(Path("r.yml"), "merge_method: passthrough\nmodels: [{model: c}]\ndtype: float16")
    assert_refused(mergekit_yaml("r.yml", "out"), 1, "model.norm.weight", "65504", "dtype: bfloat16")


def test_integers_that_differ_are_refused():
    for seed, name in enumerate("ab"):
        write_model(Path(name), tensors={**llama(seed), "model.layers.0.places": ("I64", np.arange(5) + seed)})
    write_recipe(Path("r.yml"), RECIPE)
    result = mergekit_yaml("r.yml", "out")
    assert_refused(result, 2, "model.layers.0.places", "int64", "differs between a and b", "never averaged")
    assert not Path("out/model.safetensors").exists()


def test_integers_of_different_types_are_refused_while_planning():
    for seed, (name, code) in enumerate({"a": "I64", "b": "I32"}.items()):
        places = np.arange(5).astype("<i8" if code == "I64" else "<i4")
        write_model(Path(name), tensors={**llama(seed), "model.layers.0.places": (code, places)})
    refused(RECIPE, 2, "model.layers.0.places", "[5] int64", "[5] int32")


# Output folders


def test_the_output_is_an_input():
    before = Path("a/model.safetensors").read_bytes()
    write_recipe(Path("r.yml"), RECIPE)
    Path("link").symlink_to("a")
    assert_refused(mergekit_yaml("r.yml", "a"), 2, "a already holds weights", "choose another folder")
    for out in ("a", "a/", "b/../a", "link", Path("a").resolve()):
        assert_refused(mergekit_yaml("r.yml", out, "--overwrite"), 2, "is also an input (a)", "another folder")
    assert sorted(os.listdir("a")) == ["config.json", "model.safetensors"]
    assert Path("a/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", [
    "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
    "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin",
])  # fmt: skip
def test_the_output_holds_weights_already(name):
    write_recipe(Path("r.yml"), RECIPE)
    Path("out").mkdir()
    Path("out", name).write_text("precious")
    assert_refused(mergekit_yaml("r.yml", "out"), 2, f"out already holds weights ({name})", "--overwrite")
    assert os.listdir("out") == [name]
    assert Path("out", name).read_text() == "precious"


def test_an_output_with_other_files_is_fine():
    write_recipe(Path("r.yml"), RECIPE)
    Path("out").mkdir()
    Path("out/modeling_x.py").write_text("code")
    assert mergekit_yaml("r.yml", "out").code == 0
    assert Path("out/modeling_x.py").read_text() == "code"


@pytest.mark.parametrize(("out", "code", "phrase"), [
    ("file", 2, "file is a file; give a folder"),
    ("/dev/null", 2, "/dev/null is a file"),
    ("file/out", 2, "cannot make the folder file/out"),
    ("/proc/self/out", 1, "/proc"),
    ("", 2, "OUT_PATH is empty"),
    ("o" * 300, 1, "File name too long"),
])  # fmt: skip
def test_outputs_that_cannot_be(out, code, phrase):
    write_recipe(Path("r.yml"), RECIPE)
    Path("file").write_text("precious")
    before = sorted(os.listdir("."))
    assert_refused(mergekit_yaml("r.yml", out), code, phrase)
    assert sorted(os.listdir(".")) == before
    assert Path("file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_unwritable_output():
    write_recipe(Path("r.yml"), RECIPE)
    Path("closed").mkdir(mode=0o500)
    assert_refused(mergekit_yaml("r.yml", "closed/out"), 2, "cannot make the folder closed/out: Permission denied")


def test_a_read_only_output(monkeypatch):
    """What a read-only file system does, for the superuser too."""
    write_recipe(Path("r.yml"), RECIPE)
    real = os.open

    def read_only(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    assert_refused(mergekit_yaml("r.yml", "out"), 1, "Read-only file system")
    assert not Path("out/model.safetensors").exists()


def test_a_disk_that_is_too_small(monkeypatch):
    write_recipe(Path("r.yml"), RECIPE)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(4000, 3000, 1000))
    assert_refused(mergekit_yaml("r.yml", "out"), 1, "the output needs", "free some space")
    assert not Path("out").exists()
