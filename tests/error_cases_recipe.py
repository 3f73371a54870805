"""Errors in what a recipe says: its text, its words and its references."""

from __future__ import annotations

from pathlib import Path

from error_cases_build import RECIPE, Case, Group, adds, changes, recipe

__all__ = ["GROUPS"]

SLICES = "merge_method: passthrough\nslices:\n  - sources:\n      - {model: models/a, layer_range: [%s]}\n"


def _nothing(folder: Path) -> None:
    """The situation that every case starts with."""


READING = [
    Case(
        title="There is no such recipe",
        build=_nothing,
        command="mergekit plan nowhere.yml",
        message=(
            "nowhere.yml: cannot read the recipe: No such file or directory; `mergekit new` writes one to start from"
        ),
        meaning="Check the path; it is relative to the folder that the command runs in.",
    ),
    Case(
        title="The recipe is empty",
        build=recipe("# nothing yet\n"),
        message="recipe.yml: the recipe is empty; `mergekit new` writes one to start from",
        meaning="Write a recipe; [recipe.md](recipe.md) shows how they look.",
    ),
    Case(
        title="The file is no text",
        build=recipe(RECIPE.encode("utf-16")),
        message="recipe.yml: not UTF-8 text (byte 0); is this a recipe?",
        meaning="Save the recipe as UTF-8, or give the file that is the recipe.",
    ),
    Case(
        title="The file is far too large",
        build=recipe("# " + "x" * 5_000_000),
        message="recipe.yml: more than 4 MiB are too much for a recipe",
        meaning="This is some other file: recipes have a few kilobytes.",
    ),
    Case(
        title="The file has far too many entries",
        build=recipe("a: [" + "1," * 100_001 + "]"),
        message="recipe.yml: more than 100,000 entries are too many for a recipe",
        meaning="This is some other file, such as data in YAML.",
    ),
    Case(
        title="The YAML can't be parsed",
        build=adds("parameters: {normalize: [true"),
        message=(
            "recipe.yml:8:1: not valid YAML: while parsing a flow sequence (begun at 7:25), did not find "
            "expected ',' or ']'"
        ),
        meaning="Mend the text at that line and column: mostly a bracket, a quote or the indentation.",
    ),
    Case(
        title="The recipe is indented with a tab",
        build=recipe("merge_method: linear\nmodels:\n\t- model: models/a\n"),
        message="recipe.yml:3:1: not valid YAML: a tab stands where YAML takes spaces only; indent with spaces",
        meaning="Most editors can be told to write spaces when the tab key is pressed.",
    ),
    Case(
        title="A model is given where a recipe is meant",
        build=lambda folder: None,
        command="mergekit plan models/a",
        message=(
            "models/a: this is a model's folder, and a recipe is a file; `mergekit inspect models/a` shows what the "
            "model is"
        ),
        meaning="Name the YAML file that lists the models.",
    ),
    Case(
        title="The recipe is a folder",
        build=lambda folder: None,
        command="mergekit plan models",
        message="models: this is a folder, and a recipe is a file; `mergekit new` writes one to start from",
        meaning="Name the YAML file that lists the models.",
    ),
    Case(
        title="Recipe and output are swapped",
        build=lambda folder: None,
        command="mergekit merge out recipe.yml",
        message=(
            "recipe.yml is a file; the recipe comes first, then the folder for the output: mergekit merge recipe.yml "
            "out"
        ),
        meaning="Give them in the order of the message.",
    ),
    Case(
        title="The recipe is not a mapping",
        build=recipe("- models/a\n- models/b\n"),
        message="recipe.yml:1:1: a recipe is a mapping such as 'merge_method: linear'",
        meaning="At its top level a recipe has keys, such as `merge_method` and `models`.",
    ),
    Case(
        title="A key is not text",
        build=adds("yes: 3"),
        message="recipe.yml:7:1: a key must be text; write 'yes' in quotes",
        meaning="YAML takes words such as yes, no, on and null for values; quotes make them text.",
    ),
    Case(
        title="A value can't be read",
        build=adds("dtype: 2001-99-99"),
        message="recipe.yml:7:8: '2001-99-99' can't be read as timestamp; put text in quotes",
        meaning="YAML takes the text for a date or a number; quotes make it text.",
    ),
    Case(
        title="The recipe is nested too deeply",
        build=recipe("a: " + "[" * 50 + "]" * 50),
        message="recipe.yml:1:35: nested too deeply for a recipe",
        meaning="No recipe needs so many levels: look for brackets that don't belong there.",
    ),
    Case(
        title="A part contains itself",
        build=recipe("models: &all [*all]\n"),
        message="recipe.yml:1:9: this contains itself",
        meaning="An alias (`*name`) stands inside what it names; write the part out.",
    ),
    Case(
        title="Aliases blow up the recipe",
        build=recipe(
            "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}, *a{i}]\n" for i in range(20))
        ),
        message="recipe.yml:9:5: aliases make this recipe enormous",
        meaning="Aliases that name aliases multiply; write the entries out.",
    ),
]
WORDS = [
    Case(
        title="A key is misspelt",
        build=adds("dtyp: float16"),
        message="recipe.yml:7:1: there is no 'dtyp' here. Did you mean 'dtype'?",
        meaning="Nothing unknown is passed over: write the key that is meant, or take it out.",
    ),
    Case(
        title="A key is missing",
        build=changes("merge_method: linear\n", ""),
        message="recipe.yml:1:1: 'merge_method' is missing",
        meaning="Add the key; every recipe names its method.",
    ),
    Case(
        title="A value is of the wrong kind",
        build=recipe("merge_method: linear\nmodels: models/a\n"),
        message="recipe.yml:2:1: 'models': expected a list, got 'models/a'",
        meaning="Write what is expected; here a list, each of its entries after a dash.",
    ),
    Case(
        title="A number is out of its range",
        build=adds("seed: -1"),
        message="recipe.yml:7:1: 'seed': input should be greater than or equal to 0, got -1",
        meaning="Give a number that the message allows.",
    ),
    Case(
        title="The method does not exist",
        build=changes("linear", "linaer"),
        message="recipe.yml:1:1: no merge method 'linaer'. Did you mean 'linear'?",
        meaning="`mergekit methods` lists all; methods of your own come with `--method-file`.",
    ),
    Case(
        title="The recipe is one of a mixture",
        build=recipe("base_model: models/a\nexperts: [{source_model: models/b}]\n"),
        message=(
            "recipe.yml:2:1: this is the recipe of a mixture of experts; use `mergekit moe` (with --dry-run to "
            "look first)"
        ),
        meaning="Recipes with `experts` are made into a mixture by `mergekit moe`.",
    ),
    Case(
        title="Models and slices are both given",
        build=adds("slices: [{sources: [{model: models/a, layer_range: [0, 1]}]}]"),
        message="recipe.yml:1:1: both 'models' and 'slices' are given; keep one of them",
        meaning="`models` merges whole models, `slices` ranges of layers; a recipe does one of them.",
    ),
    Case(
        title="There is nothing to merge",
        build=recipe("merge_method: linear\nmodels: []\n"),
        message="recipe.yml:1:1: nothing to merge: give 'models' or 'slices' with at least one entry",
        meaning="List the models, or the slices.",
    ),
    Case(
        title="Two tokenizer settings are given",
        build=adds("tokenizer_source: base\ntokenizer: {source: base}"),
        message="recipe.yml:1:1: both 'tokenizer' and 'tokenizer_source' are given; keep one of them",
        meaning="`tokenizer_source` is short for `tokenizer: {source: ...}`; keep the one that says more.",
    ),
    Case(
        title="The dtype does not exist",
        build=adds("dtype: floaty"),
        message="recipe.yml:7:1: no dtype 'floaty'. Valid: bfloat16, float16, float32, float64.",
        meaning="These are the element types that a model can be written in.",
    ),
    Case(
        title="The rounding does not exist",
        build=adds("rounding: up"),
        message="recipe.yml:7:1: no rounding 'up'. Valid: nearest, stochastic.",
        meaning="`stochastic` keeps what bfloat16 would swallow ([statistics.md](statistics.md)).",
    ),
    Case(
        title="The quantisation does not exist",
        build=adds("base_quantization: int8"),
        message="recipe.yml:7:1: no quantisation 'int8'. Valid: none, nf4, nf4-double, fp4, auto.",
        meaning="It says what the base of a QLoRA adapter was quantised to ([adapters.md](adapters.md)).",
    ),
    Case(
        title="A module has no content",
        build=recipe("merge_method: linear\nmodules: {default: {}}\n"),
        message="recipe.yml:2:11: a module needs exactly one of 'slices' and 'models'",
        meaning="Give the module its models or its slices.",
    ),
    Case(
        title="The recipe asks for modules",
        build=recipe("merge_method: linear\nmodules: {text_decoder: {models: [{model: models/a}]}}\n"),
        message=(
            "recipe.yml:2:11: modules other than 'default' are not built yet; a plain 'models' or 'slices' "
            "recipe merges every part of a model"
        ),
        meaning="Leave `modules` out: a plain recipe merges a multimodal model whole.",
    ),
    Case(
        title="A range of layers is empty",
        build=recipe(SLICES % "2, 1"),
        message="recipe.yml:4:27: layer_range [2, 1) is empty or negative; write [first, one past the last]",
        meaning="A range goes from its first layer to the one after its last, from 0: `[0, 3]` are three layers.",
    ),
    Case(
        title="A range goes beyond the model",
        build=recipe(SLICES % "0, 9"),
        message=(
            "recipe.yml:4:27: layer_range [0, 9) is beyond models/a, with 3 layers; its last number, one past the last "
            "layer, is 3 at most"
        ),
        meaning="Lower the end of the range to the number of layers.",
    ),
    Case(
        title="Sources of a slice differ in length",
        build=recipe(
            SLICES.replace("passthrough", "linear") % "0, 2"
            + "      - {model: models/b, layer_range: [0, 1]}\nparameters: {weight: 1}\n"
        ),
        message="recipe.yml:5:27: this source has 1 layers, but the first one of the slice has 2",
        meaning="Sources of one slice are merged layer by layer, so their ranges are of one length.",
    ),
]
REFERENCES = [
    Case(
        title="A name is not a model reference",
        build=changes("models/b", "models/b@1@2"),
        message="recipe.yml:5:5: 'models/b@1@2' is not a model reference: write path, or path@revision",
        meaning="After an @ stands one branch, tag or commit of a hub model.",
    ),
    Case(
        title="Two adapters follow a model",
        build=changes("models/b", "models/b+one+two"),
        message=(
            "recipe.yml:5:5: 'models/b+one+two' is not a model reference: at most one +adapter may follow the "
            "model (a path with + in it is written as a mapping, model: {path: ...})"
        ),
        meaning="Bake the first adapter with `mergekit lora bake`, then name the result with the second.",
    ),
    Case(
        title="A model is not text",
        build=changes("models/b", "3"),
        message="recipe.yml:5:5: expected a model (text or mapping), got int",
        meaning="Give the folder or the hub name; quotes make a number text.",
    ),
    Case(
        title="A reference has an unknown key",
        build=changes("models/b", "{model: models/b, revison: main}"),
        message="recipe.yml:5:5: a model reference has no key 'revison'",
        meaning="It may have `model`, `lora` and `override_architecture`; a revision stands inside of `model`.",
    ),
    Case(
        title="A reference names no model",
        build=changes("models/b", "{lora: adapters/c}"),
        message="recipe.yml:5:5: a model reference needs the key 'model'",
        meaning="Add `model`, the folder or hub name that the adapter goes onto.",
    ),
    Case(
        title="A revision is a number",
        build=changes("models/b", "{model: {path: models/b, revision: 3}}"),
        message=(
            "recipe.yml:5:5: expected a model path: text, or {path, revision} (a revision of digits only needs quotes)"
        ),
        meaning="Put the revision in quotes.",
    ),
    Case(
        title="An architecture is not text",
        build=changes("models/b", "{model: models/b, override_architecture: 3}"),
        message="recipe.yml:5:5: 'override_architecture' is the name of an architecture, such as LlamaForCausalLM",
        meaning="Give a class of transformers, as it stands in `architectures` of config.json.",
    ),
    Case(
        title="A model is listed twice",
        build=changes("models/b", "models/a"),
        message="recipe.yml:5:5: 'models/a' is listed twice here; keep one of them",
        meaning="Name it once, with the sum of the weights.",
    ),
    Case(
        title="One folder has two names",
        build=changes("models/b", "./models/a"),
        message="recipe.yml:5:5: './models/a' and 'models/a' are the same folder; write it the same way everywhere",
        meaning="Write the path in one way, so that its parameters go to one model.",
    ),
    Case(
        title="Parameters belong to no model",
        build=adds("input_model_parameters: {models/c: {weight: 1}}"),
        message="recipe.yml:7:26: 'models/c' is not a model of this recipe. Did you mean 'models/b'?",
        meaning="`input_model_parameters` has the names of models of this recipe as its keys.",
    ),
    Case(
        title="The base model is missing",
        build=recipe("merge_method: ties\nmodels: [{model: models/a}, {model: models/b}]\n"),
        message="recipe.yml:1:1: 'ties' needs a 'base_model'; add it at the top level",
        meaning="The method merges differences from a base: name the model that the others were fine-tuned from.",
    ),
    Case(
        title="A slice lacks the base model",
        build=recipe(
            "merge_method: slerp\nbase_model: models/a\nparameters: {t: 0.5}\nslices:\n  - sources:\n"
            "      - {model: models/b, layer_range: [0, 1]}\n      - {model: models/c, layer_range: [0, 1]}\n"
        ),
        message=(
            "recipe.yml:5:5: the base model 'models/a' is not among the sources of this slice; add it with its "
            "layer_range"
        ),
        meaning="Add the base to the sources of the slice, with its range.",
    ),
    Case(
        title="There are too many models",
        build=recipe("merge_method: passthrough\nmodels: [{model: models/a}, {model: models/b}]\n"),
        message="recipe.yml:2:1: 'passthrough' takes 1 model(s), but this gives 2",
        meaning="Take a method for that many models; the table of [methods](methods/README.md) has the numbers.",
    ),
]
GROUPS = (
    Group("Reading the recipe", "The file is no recipe yet.", READING),
    Group("Words of the recipe", "The recipe is YAML, and says something that it can't mean.", WORDS),
    Group("Models that the recipe names", "The names are wrong, whatever is on the disk.", REFERENCES),
)
