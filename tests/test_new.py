"""``mergekit new``: drafts that plan for every method, comments from the specs, and the questions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

import command
import files
import mergekit
from hostile.stage import tokenizer
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


def test_other_tokens_and_other_ids_are_united(tmp_path):
    """One model has another token, or the same tokens under other ids."""
    first, other, moved = (small_model(tmp_path / name, seed) for seed, name in enumerate(("m", "other", "moved")))
    same = new_recipe([str(first), str(other)], method="linear")
    assert "tokenizer_source" not in same.text
    (other / "tokenizer.json").write_text(json.dumps(tokenizer("zz")))
    swapped = tokenizer()
    ids = swapped["model"]["vocab"]
    ids["x"], ids["y"] = ids["y"], ids["x"]
    (moved / "tokenizer.json").write_text(json.dumps(swapped))
    for model in (other, moved):
        made = new_recipe([str(first), str(model)], method="linear")
        assert yaml.safe_load(made.text)["tokenizer_source"] == "union"
        assert "# the models' vocabularies differ" in made.text
    united = tmp_path / "united"
    mergekit.run_merge(yaml.safe_load(new_recipe([str(first), str(other)], method="linear").text), united)
    assert {"zz", "cab"} <= set(json.loads((united / "tokenizer.json").read_text())["model"]["vocab"])


def small_model(folder: Path, seed: int) -> Path:
    """A model with a tokenizer."""
    files.write_model(folder, seed)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    return folder


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


@pytest.fixture
def terminal(monkeypatch):
    """A terminal at which ``ask(answers, *arguments)`` runs the command; an answer may be an exception."""

    def ask(answers: list, *arguments: str) -> command.Result:
        rest = iter(answers)

        def answer(question: str) -> str:
            given = next(rest)
            if isinstance(given, BaseException):
                raise given
            return given

        monkeypatch.setattr("click.termui.visible_prompt_func", answer)
        monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
        done = command.mergekit("new", *arguments)
        assert next(rest, None) is None, done.err
        return done

    return ask


def test_the_questions(folders, terminal):
    """Wrong names are asked for again, and so is a method that can't take the models."""
    done = terminal([folders[0], "none", folders[1], folders[2], "", "y", "slerp", "ties", "asked.yml"])
    assert done.code == 0, done.err
    recipe = yaml.safe_load(Path("asked.yml").read_text())
    assert (recipe["merge_method"], recipe["base_model"]) == ("ties", folders[0])
    assert "  there is no folder 'none' in the current folder, and" in done.err
    assert "'slerp' does not fit 3 models" in done.err
    assert "suggested: task_arithmetic" in done.err


def test_questions_of_too_few_models_and_of_one_twice(folders, terminal):
    base, one, other, _ = folders
    done = terminal(["", one, "", one, f"./{one}", other, "", "n", "linear", "a.yml"])
    assert done.code == 0, done.err
    assert [entry["model"] for entry in yaml.safe_load(Path("a.yml").read_text())["models"]] == [one, other]
    assert done.err.count("give two models or more, or a base and one model that was made from it") == 1
    assert f"  {one} is named already; name another" in done.err
    assert f"  ./{one} is named already; name another" in done.err
    done = terminal(["", base, one, "", "n", "task_arithmetic", "b.yml"], "--base", base)
    assert done.code == 0, done.err


def test_questions_about_a_file_that_cannot_be_written(folders, terminal):
    """No answer is lost: another file is asked for, and what is there is not offered."""
    Path("recipe.yml").write_text("mine")
    done = terminal([folders[0], folders[1], "", "n", "slerp", "recipe.yml", "no/such/folder.yml", "recipe-2.yml"])
    assert done.code == 0, done.err
    assert Path("recipe.yml").read_text() == "mine"
    assert "  recipe.yml is there already\n" in done.err
    assert "  cannot write no/such/folder.yml: No such file or directory\n" in done.err
    assert Path("recipe-2.yml").read_text() == done.out
    done = terminal([folders[0], folders[1], "", "n", "slerp", "./other.yml"], "-o", "no/such/folder.yml")
    assert Path("other.yml").read_text() == done.out
    command.assert_refused(terminal([], "-o", "recipe.yml"), 2, "recipe.yml is there already; choose another name")


def test_questions_about_strangers(folders, terminal, tmp_path):
    """Nothing is suggested for models that nothing fits: the method is asked for, without a default and options."""
    import numpy as np

    for seed, name in enumerate("xy"):
        write_model(tmp_path / name, {"a.weight": np.random.default_rng(seed).standard_normal((23, 29))})
    done = terminal(["", "x", "y", "", "y", "", "ties", "linear", "a.yml"])
    assert done.code == 0, done.err
    assert yaml.safe_load(Path("a.yml").read_text())["merge_method"] == "linear"
    assert "no method is suggested" in done.err
    assert "\nsuggested:" not in done.err
    assert "--" not in done.err
    assert "'ties' needs the model that the others were made from\n" in done.err
    assert "method: linear" in done.err


def test_questions_that_are_not_answered(folders, terminal):
    for stop in (KeyboardInterrupt(), EOFError()):
        done = terminal([folders[0], stop])
        assert done.code == 130
        assert done.err.endswith("\n\ninterrupted\n"), "the prompt's line ends first"


def test_a_method_that_was_chosen_is_not_suggested(folders, terminal):
    base, *others = folders
    for done in (
        command.mergekit("new", *others, "--base", base, "--method", "ties", "-o", "a.yml"),
        terminal([*others, "", "y", "b.yml"], "--base", base, "--method", "ties"),
    ):
        assert done.code == 0, done.err
        assert "method: ties" in done.err
        assert "suggested" not in done.err


@pytest.mark.parametrize(("columns", "most"), [("60", 60), ("300", 100)])
def test_sentences_are_folded(folders, monkeypatch, columns, most):
    monkeypatch.setenv("COLUMNS", columns)
    done = command.mergekit("new", *folders[1:], "--base", folders[0])
    shown = [line for line in done.err.splitlines() if line.startswith(("* ", "  "))]
    assert any(line.startswith("  ") for line in shown)
    assert most - 20 < max(map(len, shown)) <= most


def test_errors_are_ours(folders):
    for arguments in (["x", "y"], [folders[0], "org/none"]):
        with pytest.raises(MergekitError):
            new_recipe(arguments)
