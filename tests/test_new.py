"""``mergekit new``: drafts that plan for every method, comments from the specs, and the questions."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

import command
import mergekit
from mergekit.api.compare import diff
from mergekit.api.draft import draft
from mergekit.api.new import new_recipe, write_recipe
from mergekit.errors import IncompatibleError, MergekitError, UsageError
from mergekit.methods import get_method, method_names
from models import family, write_model

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folders(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [os.path.relpath(folder, tmp_path) for folder in family(tmp_path, 4, delta=0.05)]


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("has_base", [True, False])
def test_every_method_gets_a_recipe_that_plans_or_a_reason(folders, method, has_base):
    spec = get_method(method)
    base = folders[0] if has_base else None
    count = 1 if has_base and spec.base == "required" and spec.most == 2 else spec.most or 3
    chosen = folders[1 : 1 + max(count, 1 if has_base else 2)]
    if (method == "passthrough" and not has_base) or (spec.base == "required" and spec.most != 2 and not has_base):
        with pytest.raises(UsageError, match=r"does not fit 2 models|needs the model that the others were made from"):
            new_recipe(chosen, base=base, method=method)
        return
    made = new_recipe(chosen, base=base, method=method)
    recipe = yaml.safe_load(made.text)
    assert recipe["merge_method"] == made.method == method
    assert [entry["model"] for entry in recipe["models"]] == chosen
    assert recipe["dtype"] == "float32"
    assert spec.summary.replace("``", "") in made.text
    for parameter in spec.params:
        if parameter.name in str(recipe.get("parameters", {})) + str(recipe["models"][0].get("parameters", {})):
            assert parameter.help.replace("``", "") in made.text


def test_figures_choose_method_and_weights(folders):
    base, *others = folders
    made = new_recipe(others, base=base, comparison=diff(*folders))
    recipe = yaml.safe_load(made.text)
    assert recipe["merge_method"] == "task_arithmetic"
    (weight,) = {entry["parameters"]["weight"] for entry in recipe["models"]}
    assert weight == pytest.approx(3**-0.5, abs=0.02)
    assert all(reason[1:20] in made.text for reason in made.reasons)
    assert yaml.safe_load(new_recipe(others, comparison=diff(*others)).text)["merge_method"] == "linear"
    assert yaml.safe_load(new_recipe(others[:2], comparison=diff(*others[:2])).text)["merge_method"] == "slerp"
    dare = yaml.safe_load(new_recipe(others, base=base, method="dare_ties", comparison=diff(*folders)).text)
    assert dare["models"][0]["parameters"] == {"weight": weight, "density": 0.5}


def test_models_of_which_no_merge_comes(folders, tmp_path):
    import numpy as np

    first = {"a.weight": np.random.default_rng(0).standard_normal((23, 29))}
    other = {"a.weight": np.random.default_rng(1).standard_normal((23, 29))}
    strangers = [str(write_model(tmp_path / n, tensors)) for n, tensors in (("x", first), ("y", other))]
    with pytest.raises(UsageError, match="too far from x"):
        new_recipe(strangers, comparison=diff(*strangers))
    assert new_recipe(strangers, method="linear", comparison=diff(*strangers)).method == "linear"
    with pytest.raises(IncompatibleError):
        new_recipe([strangers[0], folders[1]], method="linear")
    with pytest.raises(UsageError, match="Did you mean 'ties'"):
        new_recipe(folders, method="tiess")
    for models, base in (([], None), (folders[:1], None), ([folders[0]], folders[0])):
        with pytest.raises(UsageError, match="give two models or more"):
            draft(models, base=base)


def test_other_vocabularies_are_united():
    made = new_recipe([str(ROOT / "models/code"), str(ROOT / "models/calc")])
    assert "tokenizer_source" not in made.text
    assert "tokenizer_source: union" in draft(["a", "b"], tokenizer="union").text


def test_names_are_quoted_where_yaml_needs_it():
    for name in ("a: b", "yes", "1.0", "- x", "#", "é", "'", 'a"b', "org/model@v1+org/lora"):
        assert yaml.safe_load(draft([name, "b"]).text)["models"][0]["model"] == name


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\x85- b", "a\u2028b: c", "a\u202eb"])
def test_names_can_not_leave_their_place(folders, name):
    """Not in a comment, and not in a value."""
    Path(folders[1]).rename(name)
    made = new_recipe([folders[0], name], comparison=diff(folders[0], name))
    assert yaml.safe_load(made.text)["models"][-1]["model"] == name
    assert all(line.isprintable() for line in made.text.splitlines())
    with pytest.raises(UsageError, match="is no text in UTF-8"):
        draft([folders[0], os.fsdecode(b"b\x80c")])


def test_models_equal_to_the_first_are_left_out(folders):
    base, one, two, _ = folders
    shutil.copytree(base, "copy")
    for models, own in (([one, "copy"], base), ([base, one, "copy"], None)):
        compared = [*([own] if own else []), *models]
        made = new_recipe(models, base=own, comparison=diff(*compared))
        assert "copy has the weights of m0 and is left out" in made.reasons
        assert "model: copy" not in made.text
        assert made.method == "slerp"
    made = new_recipe([one, two, "copy"], base=base, comparison=diff(base, one, two, "copy"))
    assert [entry["model"] for entry in yaml.safe_load(made.text)["models"]] == [one, two]
    with pytest.raises(UsageError, match="nothing to merge"):
        new_recipe([base, "copy"], comparison=diff(base, "copy"))


def test_a_recipe_replaces_no_file_of_a_model_and_is_there_whole(folders):
    done = command.mergekit("new", *folders[:2], "-o", f"{folders[1]}/config.json", "--overwrite", "--no-look")
    command.assert_refused(done, 2, "lies in the folder of a model")
    made = draft(["a", "b"])
    if os.path.exists("/dev/full"):
        with pytest.raises(UsageError, match="No space left"):
            write_recipe(made, Path("/dev/full"), overwrite=True)


def test_the_command_without_a_terminal(folders):
    base, *others = folders
    done = command.mergekit("new", *others, "--base", base, "-o", "made.yml")
    assert done.code == 0, done.err
    assert Path("made.yml").read_text() == done.out
    assert "suggested: task_arithmetic" in done.err
    assert "* m1 is related to m0" in done.err
    mergekit.run_merge("made.yml", "out")
    again = command.mergekit("new", *others, "--base", base, "-o", "made.yml")
    command.assert_refused(again, 2, "made.yml is there already")
    command.assert_refused(command.mergekit("new"), 2, "give two models or more")
    command.assert_refused(command.mergekit("new", others[0], "./nothing"), 2, "nothing")
    command.assert_refused(command.mergekit("new", *others, "-o", "no/such/folder.yml", "--no-look"), 2, "cannot write")


def test_the_questions(folders, monkeypatch):
    """A terminal answers: wrong names are asked for again, and so is a method that can't take the models."""
    answers = iter([folders[0], "none", folders[1], folders[2], "", "y", "slerp", "ties", "asked.yml"])
    monkeypatch.setattr(
        "sys.stdin",
        type("Terminal", (), {"isatty": lambda self: True})(),
    )
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: next(answers))
    done = command.mergekit("new")
    assert done.code == 0, done.err
    recipe = yaml.safe_load(Path("asked.yml").read_text())
    assert (recipe["merge_method"], recipe["base_model"]) == ("ties", folders[0])
    assert "no folder 'none'" in done.err or "none" in done.err
    assert "'slerp' does not fit 3 models" in done.err
    assert next(answers, None) is None


def test_errors_are_ours(folders):
    for arguments in (["x", "y"], [folders[0], "org/none"]):
        with pytest.raises(MergekitError):
            new_recipe(arguments)
