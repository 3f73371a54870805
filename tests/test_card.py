"""The model card: metadata that the hub reads, licences of the inputs, figures, and names that can't break it."""

from __future__ import annotations

import ast
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import mergekit
from command import mergekit as command
from files import write_model, write_recipe
from mergekit.api.merged import MergedModel
from mergekit.methods import get_method, method_names
from mergekit.output.card import model_card
from mergekit.output.card_parts import _bibtex, published
from mergekit.output.markdown import escape, fenced
from mergekit.output.moe_card import moe_card
from mergekit.output.paths import local_paths, without_paths
from mergekit.planning.input_cards import InputCard, Licence, read_card
from mergekit.planning.licences import terms

ROOT = Path(mergekit.__file__).parent.parent


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(**cards: str) -> list[dict[str, Any]]:
    """A folder with a tiny model for each name, with a README.md unless it is empty; entries of a recipe."""
    for seed, (name, card) in enumerate(cards.items()):
        write_model(Path(name), seed)
        if card:
            Path(name, "README.md").write_text(f"---\n{card}\n---\n# {name}\n")
    return [{"model": name} for name in cards]


def plan_of(entries: list[dict[str, Any]], method: str = "linear", **more: Any) -> Any:
    return mergekit.plan({"merge_method": method, "models": entries, "parameters": {"weight": 1.0}, **more})


def metadata(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found = yaml.safe_load(card[4:].partition("\n---\n")[0])
    assert isinstance(found, dict)
    return found


# What is inherited


def test_one_licence_languages_and_tags_are_inherited():
    plan = plan_of(make(
        a="license: apache-2.0\nlanguage: [en, no]\ntags: [code, trl, 'arxiv:1234.5678', merge]",
        b="license: Apache-2.0\nlanguage: de\ntags: [code, chat]\npipeline_tag: text-generation",
    ))  # fmt: skip
    found = metadata(model_card(plan, "out"))
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en", "no", "de"],
        "tags": ["mergekit", "merge", "linear", "code", "chat"],
    }
    assert not [text for text in plan.warnings if "licence" in text]
    assert "## Licences" not in model_card(plan, "out")


def test_licences_that_differ_become_a_table_and_a_warning():
    plan = plan_of(make(a="license: mit", b="license: cc-by-nc-4.0", c=""))
    [warning] = [text for text in plan.warnings if "licence" in text]
    assert warning == (
        "the models' licences differ: a: mit, b: cc-by-nc-4.0 (for non-commercial use), c: none named; read them "
        "before you pass the result on"
    )
    card = model_card(plan, "out")
    found = metadata(card)
    assert (found["license"], found["license_name"]) == ("other", "licences-of-the-inputs")
    assert "| b | cc-by-nc-4.0 | for non-commercial use |" in card
    assert "| c | none named |  |" in card
    assert warning not in card, "the table says it"


def test_no_licence_at_all_is_not_worth_a_word():
    plan = plan_of(make(a="", b=""))
    assert not [text for text in (*plan.warnings, *plan.notes) if "licence" in text]
    assert "licence" not in model_card(plan, "out")


def test_a_licence_of_a_name_of_its_own():
    text = "license: other\nlicense_name: our-research-licence\nlicense_link: https://example.org/terms"
    plan = plan_of(make(a=text, b=text))
    assert metadata(model_card(plan, "out"))["license_link"] == "https://example.org/terms"
    assert "the models' licence, our-research-licence: not for use in production" in plan.notes


@pytest.mark.parametrize(("name", "word"), [
    ("cc-by-nc-4.0", "non-commercial"), ("cc-by-nc-nd-4.0", "changed versions"), ("gpl-3.0", "stays under it"),
    ("agpl-3.0", "stays under it"), ("cc-by-sa-4.0", "stays under it"), ("llama3", "Llama 3"), ("llama3.1", "'Llama'"),
    ("llama2", "notice"), ("gemma", "limits of use"), ("openrail", "limits of use"),
])  # fmt: skip
def test_what_licences_ask(name, word):
    assert word in "; ".join(terms(Licence((name,))))


@pytest.mark.parametrize("name", ["mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "unlicense"])
def test_licences_that_ask_for_a_notice_only(name):
    assert terms(Licence((name,))) == []


# Hostile cards


BOMB = "tags:\n  - &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  - &{chr(97 + i)} [{', '.join([f'*{chr(96 + i)}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize("text", [
    f"---\n{BOMB}license: mit\n---\n", "---\ntags: " + "[" * 5000 + "\n---\n", "---\nlicense: mit\n",
    "---\nlicense: !!python/object/apply:os.system [x]\n---\n", "---\nlicense: \x00\n---\n",
    "---\n" + "a" * (2 << 20) + ": 1\nlicense: mit\n---\n",
], ids=["aliases", "deep", "no end", "an object", "no text", "large"])  # fmt: skip
def test_broken_front_matter_hands_nothing_down(text):
    [entry] = make(a="")
    Path("a/README.md").write_text(text)
    assert read_card(Path("a")) == InputCard(is_readable=False)
    assert "a: its README.md can't be read, so no licence, language or tag is taken from it" in plan_of([entry]).notes


@pytest.mark.parametrize("text", ["", "# only text", "---\n---\n", "---\n# nothing\n\n---\n", "---\n- a\n---\n"])
def test_cards_without_front_matter(text):
    make(a="")
    Path("a/README.md").write_text(text)
    assert read_card(Path("a")).licence is None


def test_results_of_benchmarks_are_passed_over():
    make(a="")
    results = "".join(f"  - value: {i}\n    license: mit\n" for i in range(9999))
    head = f"'license': gpl-3.0\nmodel-index: &a\n{results}again: *a\nlanguage:\n# two\n- en\n- de"
    Path("a/README.md").write_text(f"---\n{head}\n---\n")
    assert read_card(Path("a")) == InputCard(Licence(("gpl-3.0",)), ("en", "de"))


@pytest.mark.parametrize("text", [
    "{license: cc-by-nc-4.0, language: [en]}",
    "# ours\n{\nlicense: cc-by-nc-4.0,\nlanguage: en}",
    "  license: cc-by-nc-4.0\n  language: en",
    "license: |\n  cc-by-nc-4.0\nlanguage: >-\n  en",
    "? license\n: cc-by-nc-4.0\n? language\n: en",
], ids=["flow", "lines of flow", "indented", "block", "explicit keys"])  # fmt: skip
def test_front_matter_in_other_forms_of_yaml(text):
    make(a=text)
    assert read_card(Path("a")) == InputCard(Licence(("cc-by-nc-4.0",)), ("en",))


@pytest.mark.parametrize("licence", ["'MIT License (see the file)'", "{mit: 1}", "[3]", "|\n  Copyright\n  ours"])
def test_a_licence_of_no_known_form_is_told(licence):
    entries = make(a=f"license: {licence}\ntags: [x]", b="license: none", c="license:")
    notes = [text for text in plan_of(entries).notes if "licence" in text]
    assert notes == ["a: the licence in its README.md is none of the hub's names, so it is left out; read it there"]


def test_cards_are_read_once():
    entries = make(a="license: mit", b="license: apache-2.0")
    plan = plan_of(entries)
    before = model_card(plan, "out")
    Path("a/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert model_card(pickle.loads(pickle.dumps(plan)), "out") == before
    assert plan_of(entries).digest() == plan.digest(), "a card decides no byte of the weights"


def test_a_card_that_is_no_file():
    make(a="", b="")
    Path("a/README.md").mkdir()
    os.mkfifo("b/README.md")
    assert read_card(Path("a")) == read_card(Path("b")) == InputCard()


def test_values_of_another_form_are_left_out():
    plan = plan_of(make(
        a="license: ['mit\\n---\\n# gotcha', {x: 1}]\nlanguage: {en: 1}\npipeline_tag: ['<b>']\n"
        "tags: [ok, '](x)', \"a\\nb: c\", 3, '', '| x |']",
        b="license: other\nlicense_name: '[x](javascript:alert(1))'\nlicense_link: 'javascript:alert(1)'",
    ))  # fmt: skip
    card = model_card(plan, "out")
    assert metadata(card)["tags"] == ["mergekit", "merge", "linear", "ok"]
    assert "gotcha" not in card
    assert "javascript" not in card


# Names


@pytest.mark.parametrize("name", ["a|b", "`x`", "**x**", "[x](y)", "<img src=x>", "---", "# x", "a_b_c", "_x_"])
def test_names_are_names_in_markdown(name):
    card = model_card(plan_of(make(**{name: "", "other": "license: mit"})), name)
    assert card.count("\n---\n") == 1
    assert f"\n# {escape(name)}\n" in card
    models = card.partition("## Models\n\n")[2].partition("\n\n")[0].splitlines()
    assert [len(re.split(r"(?<!\\)\|", row)) for row in models] == [5] * 4, models
    text = re.sub(r"```.*?```", "", card, flags=re.S)
    assert not re.search(r"(?<!\\)(<img|\]\(y\)|\*\*x|`x)", text)


def test_control_characters_are_gone():
    assert escape("a\nb\x1b[0m\u202e") == "a b \\[0m "
    assert escape("snake_case_name _x_") == "snake_case_name \\_x\\_"


def test_a_recipe_can_not_end_its_block():
    entries = make(a="")
    Path("r.yml").write_text(f"# ```\n# ````\nmerge_method: passthrough\nmodels: {entries}\n")
    card = model_card(mergekit.plan("r.yml"), "out")
    assert "`````yaml\n# ```\n# ````\n" in card
    assert fenced("x") == "```\nx\n```"


# The body


def test_parameters_are_those_of_the_models():
    entries = make(base="", a="", b="")[1:]
    entries[0]["parameters"] = {"weight": [0.1, 0.9], "density": 0.5}
    entries[1]["parameters"] = {"weight": 0.25, "density": [{"filter": "mlp", "value": 0.75}, {"value": 1}]}
    recipe = {"merge_method": "ties", "base_model": "base", "models": entries}
    card = model_card(mergekit.plan({**recipe, "parameters": {"lambda": 0.8}}), "out")
    assert "| model | weight | density |" in card
    assert re.search(r"^\| a \| 0\.1, 0\.5, 0\.9 \| 0\.5 \|$", card, re.M)
    assert re.search(r"^\| b \| 0\.25 \| (1, 0\.75|0\.75, 1) \|$", card, re.M)
    assert "| base (base) |  |  |" in card
    assert "For all of them: lambda 0.8." in card
    assert "a merge of **a** and **b** onto the base model **base**, with mergekit by [TIES]" in card


def test_figures_are_those_of_the_statistics():
    entries = [{"model": f"models/{name}", "parameters": {"weight": 1}} for name in ("code", "calc")]
    os.symlink(ROOT / "models", "models")
    mergekit.run_merge({"merge_method": "task_arithmetic", "base_model": "models/base", "models": entries}, "out")
    summary = yaml.safe_load(Path("out/merge_stats.json").read_text())["summary"]
    card = Path("out/README.md").read_text()
    cosine = f"{summary['cosines']['models/code, models/calc']:.2f}"
    assert f"| models/code | {summary['deltas']['models/code']:.4g} |  | {cosine} |" in card
    assert f"| **merged** | {summary['change']:.4g} |  |  |" in card
    assert f"(cosine {cosine})" in card
    assert f"disagree on the sign of {100 * summary['sign_conflict']:.0f} %" in card
    assert str(Path.cwd()) not in card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    assert "apply_chat_template" in code
    ast.parse(code)


def test_folders_of_one_name_are_told_apart():
    base, *entries = make(**{"base": "", "runs/1/best": "license: mit", "runs/2/best": "license: apache-2.0"})
    recipe = {"merge_method": "task_arithmetic", "base_model": base["model"], "models": entries}
    mergekit.run_merge({**recipe, "parameters": {"weight": 1}}, "out")
    summary = yaml.safe_load(Path("out/merge_stats.json").read_text())["summary"]
    assert list(summary["deltas"]) == ["best", "best (2)"]
    assert list(summary["cosines"]) == ["best, best (2)"]
    card = Path("out/README.md").read_text()
    assert "| best | mit | 1 |" in card
    assert "| best (2) | apache-2.0 | 1 |" in card
    assert "runs/1" not in card.replace(Path("out/mergekit_config.yml").read_text(), "")


def test_without_statistics_there_are_no_figures():
    card = model_card(plan_of(make(a="", b="")), "out")
    assert "What the merge did" not in card
    assert "AutoTokenizer" not in card, "there is no tokenizer"


def test_a_published_card_names_the_repository():
    card = model_card(plan_of(make(a="", b="")), 'my "model"')
    assert '\nname = "my \\"model\\""  #' in card
    assert '\nname = "org/name"\n' in published(card, "org/name")
    assert published("name = 'mine'", "org/name") == "name = 'mine'", "what people wrote stays"


def test_every_paper_becomes_bibtex_or_a_line():
    for method in map(get_method, method_names()):
        if entry := _bibtex(method):
            assert entry.count("{") == entry.count("}")
            assert re.match(r"@misc\{[a-z]+\d{4},\n  title = ", entry)
            assert method.url in entry
    assert "author = {Davari and Belilovsky}" in _bibtex(get_method("breadcrumbs"))
    assert "author = {Yadav and others}" in _bibtex(get_method("ties"))
    assert _bibtex(get_method("passthrough")) == ""


def test_the_card_of_a_mixture(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = mergekit.api.plan_moe("examples/phi3_moe/recipe.yml").plan
    card = moe_card(plan, "out", None)
    assert metadata(card)["tags"] == ["mergekit", "merge", "moe"]
    assert "| 1 | models/prose |" in card
    assert "the average of the experts' models" in card
    assert "mergekit reproduce" in card


def test_paths_of_this_machine():
    assert local_paths("model: /home/me/models/a # at 1/2, ~/x\nb: org/name\nc: models/b") == [
        "/home/me/models/a",
        "~/x",
    ]


@pytest.mark.parametrize(("text", "shown"), [
    ("# from /home/jane doe/secret client/models", "# from models"),
    ("# /home/jane doe/secret client/models on Monday", "# models on Monday"),
    ("# /home/jane/a and /home/jane doe/b, not org/name", "# a and b, not org/name"),
    ("file: /home/jane doe/some (old), more/prompts.txt # kept", "file: prompts.txt # kept"),
    ("- '/home/jane doe/x: y/z'", "- 'z'"),
    ('{"path": "/home/jane doe/x, y/z", "b": 1}', '{"path": "z", "b": 1}'),
    ("[/models/a, /mnt/jane doe/b]", "[a, b]"),
    ("model: /models", "model: models"),
    ("# in /models/", "# in models"),
    ("see ~jane/x and ~/y.", "see x and y."),
    ("file:///home/jane/x", "x"),
    ("at C:\\Users\\jane doe\\x.", "at x."),
    ("'C:/Users/jane doe/x'", "'x'"),
    ("# jane's: /home/jane's files/x", "# jane's: x"),
    ("org/base+/home/jane/lora", "org/base+lora"),
    ("path=/home/jane/x", "path=x"),
    ("# /home/jane/x, half of it, 1/2, from https://hf.co/org/name", "# x, half of it, 1/2, from https://hf.co/org/name"),
    ("# /home/jane/x of https://hf.co/org/name", "# x of https://hf.co/org/name"),
    ("/home/jane/r.yml:5:5: no folder 'models/code' here", "r.yml:5:5: no folder 'models/code' here"),
])  # fmt: skip
def test_local_paths_are_hidden(text, shown):
    assert without_paths(text, None) == shown
    assert local_paths(text)
    assert not local_paths(shown)


@pytest.mark.parametrize("text", [
    "# 1/2 of it, 3 /4, about ~5 and ~1/2", "model: org/name@main+org/lora", "url: https://user:x@hf.co/a/b?c=/d",
    "- filter: '^model\\.layers\\.\\d+\\.(mlp|self_attn)/x'", "filter: (^|/)mlp[/.]",
    "[/INST] <</SYS>> </s> <|/think|>", "a / b, and/or, ./x, ../x/y", "models/code", "s3://bucket/key",
])  # fmt: skip
def test_what_is_no_local_path_stays(text):
    assert without_paths(text, None) == text
    assert local_paths(text) == []


def test_a_path_in_a_comment_is_in_neither_card_nor_report(tmp_path):
    entries = make(a="")
    secret = "# /home/jane doe/secret client/models, C:\\Users\\jane doe\\x\n"
    Path("r.yml").write_text(f"{secret}merge_method: passthrough\nmodels: {entries}\n")
    mergekit.run_merge("r.yml", "out", report=True)
    for name in ("README.md", "merge_report.html"):
        text = Path("out", name).read_text()
        assert "models, x" in text
        assert "jane" not in text
        assert "secret" not in text


def test_the_recipe_of_the_card_tells_folders_of_one_name_apart(tmp_path):
    first, second = make(**{"runs/1/best": "", "runs/2/best": ""})
    second["model"] = str(tmp_path / second["model"])
    card = model_card(plan_of([first, second]), "out")
    found = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.S)[-1])
    assert [entry["model"] for entry in found["models"]] == ["best", "best (2)"]


def test_paths_are_found_in_time():
    """A pattern that tries all ways to part such a line would need hours."""
    for text in (" /a" * 100_000, "/a b" * 100_000, "'/a " * 50_000, "- /a " * 50_000, "a: /" + " x" * 100_000):
        assert local_paths(text) == local_paths(text + " ")


# Loading it


@pytest.mark.parametrize(("settings", "auto", "task"), [
    ({"architectures": ["GPT2LMHeadModel"]}, "AutoModelForCausalLM", "text-generation"),
    ({"architectures": ["BertForMaskedLM"]}, "AutoModelForMaskedLM", None),
    ({"architectures": ["BertModel"]}, "AutoModel", None),
    ({"architectures": ["LlamaForCausalLM"], "auto_map": {}}, "AutoModelForCausalLM", "text-generation"),
    ({"architectures": ["LlamaForTokenClassification"]}, "AutoModelForTokenClassification", None),
])  # fmt: skip
def test_card_terminal_and_notebook_load_it_alike(settings, auto, task):
    write_model(Path("a"), settings=settings)
    Path("a/tokenizer_config.json").write_text("{}")
    Path("a/helper.py").write_text("")
    done = command("merge", write_recipe(Path("r.yml"), "merge_method: passthrough\nmodels: [{model: a}]"), "out")
    card = Path("out/README.md").read_text()
    trust = ", trust_remote_code=True" if "auto_map" in settings else ""
    assert f"model = {auto}.from_pretrained(name{trust})\n" in card
    assert f"tokenizer = AutoTokenizer.from_pretrained(name{trust})\n" in card
    assert ("model.generate" in card) == (task is not None)
    assert metadata(card).get("pipeline_tag") == task
    assert f'load it: {auto}.from_pretrained("out"{trust})   check' in done.err
    assert f"load it: {auto}.from_pretrained(&#x27;out&#x27;{trust})" in MergedModel("out")._repr_html_()


def test_a_tokenizer_with_code_of_its_own():
    make(a="")
    Path("a/tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.T", null]}}')
    card = model_card(plan_of([{"model": "a"}]), "out")
    assert "model = AutoModelForCausalLM.from_pretrained(name)\n" in card
    assert "AutoTokenizer.from_pretrained(name, trust_remote_code=True)" in card


def test_code_in_the_summary_of_a_method_is_code_in_markdown():
    card = model_card(plan_of(make(a=""), "passthrough", parameters={}), "out")
    assert "unchanged or multiplied by `scale`. It has" in card
