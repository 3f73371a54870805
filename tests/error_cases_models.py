"""Errors of models that are not there, and of models that don't fit together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from error_cases_build import (
    MERGE,
    Build,
    Case,
    Group,
    changes,
    config,
    model,
    one_tensor,
    recipe,
    several,
    tensors,
    without,
)
from files import llama, write_safetensors

__all__ = ["GROUPS"]

STACK = (
    "merge_method: passthrough\nslices:\n  - sources: [{model: models/a, layer_range: [0, 1]}]\n"
    "  - sources: [{model: models/b, layer_range: [0, 1]}]\n"
)
WEIGHTS = "models/b/model.safetensors"


def _shards(folder: Path) -> None:
    """An index of two shards, of which one is there."""
    names = list(llama(1))
    files = {name: f"model-0000{1 + (i > 4)}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "models/b/model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / WEIGHTS).rename(folder / "models/b/model-00001-of-00002.safetensors")


def _unlike(name: str, first: str, second: str, shift: int = 0) -> Build:
    """Both models with a tensor of integers, of two types or values."""
    places = np.arange(5)
    return several(
        model("a", {name: (first, places.astype("<i8" if first == "I64" else "<i4"))}, seed=0),
        model("b", {name: (second, (places + shift).astype("<i8" if second == "I64" else "<i4"))}),
    )


def _one(name: str) -> Build:
    """A model with a single weight file of another name."""

    def build(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "models/b" / name).write_bytes(b"GGUF")

    return build


def _moves(folder: Path) -> None:
    (folder / "work").mkdir()
    for name in ("models", "recipe.yml"):
        (folder / name).rename(folder / "work" / name)


_PARTS = {
    "a": {**one_tensor("v"), **one_tensor("w")},
    "b": one_tensor("v"),
    "c": one_tensor("w"),
}
"""Models of which each tensor is in two only."""
FINDING = [
    Case(
        title="There is no such folder",
        build=changes("models/b", "./models/nowhere"),
        message=(
            "recipe.yml:5:5: no folder 'models/nowhere'; give the path of a model folder, or a hub name like org/model"
        ),
        meaning="Check the path: it is relative to the folder that the command runs in, not to the recipe's.",
    ),
    Case(
        title="The folder is beside the recipe, and the command runs elsewhere",
        build=_moves,
        command="mergekit plan work/recipe.yml",
        message=(
            "work/recipe.yml:3:5: no folder 'models/a' here, but 'work/models/a' is there: paths in a recipe begin in "
            "the current folder; run the command in work, or write the path from here"
        ),
        meaning="Paths are relative to the folder that the command runs in, not to the recipe's.",
    ),
    Case(
        title="A model is meant, and a recipe is given",
        build=lambda folder: None,
        command="mergekit inspect recipe.yml",
        message=(
            "'recipe.yml' is a file, and a model is a folder; `mergekit plan recipe.yml` shows what a recipe would "
            "make, `mergekit merge recipe.yml out` makes it"
        ),
        meaning="`inspect`, `verify`, `diff` and `report` look at models, `plan` and `explain` at recipes.",
    ),
    Case(
        title="A folder holds no weights",
        build=without(WEIGHTS),
        message=(
            "recipe.yml:5:5: models/b: no model.safetensors, no pytorch_model.bin and no index of either; it "
            "holds no weights"
        ),
        meaning="Download the model again, or point to the folder that has its weights.",
    ),
    Case(
        title="It is not clear which files are the weights",
        build=several(
            without(WEIGHTS),
            *(
                lambda f, n=n: write_safetensors(f / f"models/b/{n}", llama(1))
                for n in ("x.safetensors", "y.safetensors")
            ),
        ),
        message=(
            "recipe.yml:5:5: models/b: no model.safetensors, no pytorch_model.bin and no index of either; "
            "found x.safetensors, y.safetensors"
        ),
        meaning="Add the index that came with the files, or leave one weight file in the folder.",
    ),
    Case(
        title="Shards are missing",
        build=_shards,
        message=(
            "recipe.yml:5:5: models/b: 1 of 2 shards are missing, first model-00002-of-00002.safetensors; "
            "download the model again"
        ),
        meaning="The download was not finished: start it again, it fetches what is missing.",
    ),
    Case(
        title="The model is a GGUF file",
        build=_one("model-q4.gguf"),
        code=1,
        message="models/b: GGUF files can't be merged; use the safetensors version of this model",
        meaning="Merge the original model, and convert the result.",
    ),
    Case(
        title="The model is an adapter",
        build=_one("adapter_model.safetensors"),
        code=1,
        message="models/b: this is an adapter, not a model; write base+adapter in the recipe",
        meaning="An adapter goes onto a model: `models/base+adapters/b` ([adapters.md](adapters.md)).",
    ),
]
FITTING = [
    Case(
        title="Architectures differ",
        build=config(architectures=["MistralForCausalLM"]),
        message=(
            "models/b is a MistralForCausalLM, but models/a is a LlamaForCausalLM; merge models of one "
            "architecture, or pass --allow-crimes to try anyway"
        ),
        meaning="Their weights mean different things; the option is for families whose tensors have the same names.",
    ),
    Case(
        title="Numbers of layers differ",
        build=model(layers=2),
        message="recipe.yml:5:5: models/b has 2 layers, but models/a has 3; use 'slices' to choose layers of each",
        meaning="Choose with `slices` which layers of each go together.",
    ),
    Case(
        title="Shapes differ",
        build=model(intermediate=17),
        is_table=True,
        message=(
            "cannot merge model.layers.0.mlp.up_proj.weight: shapes differ\n"
            "  models/a  [13, 7] bfloat16  model.safetensors\n"
            "  models/b  [17, 7] bfloat16  model.safetensors\n"
            "These models don't fit together; merge models that were fine-tuned from the same base."
        ),
        meaning="The models are of different sizes, so their weights can't be averaged.",
    ),
    Case(
        title="Vocabularies differ in size",
        build=model(vocab=33),
        is_table=True,
        message=(
            "cannot merge model.embed_tokens.weight: the vocabularies differ in size\n"
            "  models/a  [31, 7] bfloat16  model.safetensors\n"
            "  models/b  [33, 7] bfloat16  model.safetensors\n"
            "Configure a tokenizer ('tokenizer_source: union' or 'base'), or pass --unsafe-truncate-embeddings "
            "to keep the first 31 rows."
        ),
        meaning="`union` keeps the tokens of all models ([tokenizers.md](tokenizers.md)); cutting suits mere padding.",
    ),
    Case(
        title="Integer tensors differ in type",
        build=_unlike("model.layers.0.places", "I64", "I32"),
        is_table=True,
        message=(
            "cannot merge model.layers.0.places: integer tensors must be the same in every model\n"
            "  models/a  [5] int64  model.safetensors\n"
            "  models/b  [5] int32  model.safetensors"
        ),
        meaning="Integers are places or counts, and no average of them means anything.",
    ),
    Case(
        title="Integer tensors differ in value",
        build=_unlike("model.layers.0.places", "I64", "I64", 1),
        command=MERGE,
        message=(
            "cannot merge model.layers.0.places: this int64 tensor differs between models/a and models/b, and "
            "integers are never averaged"
        ),
        meaning="Integers are copied where they agree; take models that were fine-tuned from one base.",
    ),
    Case(
        title="A model shares no tensor with the others",
        build=several(
            tensors({f"transformer.{name}": array for name, array in one_tensor("h.0.attn.c_attn.weight").items()}),
            config(architectures=None),
        ),
        message="models/b has none of the tensors of models/a; merge models of one architecture",
        meaning="It is another architecture, or its tensors have other names.",
    ),
    Case(
        title="Nothing remains to be merged",
        build=several(
            recipe("merge_method: model_stock\nbase_model: models/a\nmodels: [{model: models/b}, {model: models/c}]\n"),
            model("c"),
            *(tensors(found, name) for name, found in _PARTS.items()),
        ),
        message="the recipe selects no tensor at all",
        meaning="The method merges three copies of a tensor or more, and no tensor is in so many models.",
    ),
]
SLICING = [
    Case(
        title="A model has no layers to slice",
        build=several(recipe(STACK), *(tensors(one_tensor("w"), name) for name in "ab")),
        message="models/a: no numbered layers found, so it can't be sliced",
        meaning="`slices` counts tensors such as `model.layers.0`; merge this model whole, with `models`.",
    ),
    Case(
        title="A model has an encoder and a decoder",
        build=several(recipe(STACK), *(config(name, is_encoder_decoder=True) for name in "ab")),
        message=(
            "models/a has an encoder and a decoder, and 'slices' can't tell their layers apart; merge whole "
            "models with 'models'"
        ),
        meaning="Its two stacks can be merged, but not cut.",
    ),
    Case(
        title="Layers of different shapes can't be stacked",
        build=several(recipe(STACK), model(intermediate=17)),
        message=(
            "cannot stack model.layers.0.mlp.up_proj.weight of models/b ([17, 7] bfloat16) among the layers of "
            "models/a, where its shape is [13, 7]"
        ),
        meaning="One config.json describes all layers of a model, so all have to be of one size.",
    ),
    Case(
        title="The first and the last slice have different vocabularies",
        build=several(recipe(STACK), model(vocab=33)),
        message=(
            "the first slice's embeddings have 31 rows, but the last slice's head has 33; take both slices "
            "from models with one vocabulary"
        ),
        meaning="Embeddings come with the first slice, the head with the last.",
    ),
]
GROUPS = (
    Group("Finding the models", "What a recipe names has to be a folder with a model, or a model on the hub.", FINDING),
    Group("Models that don't fit together", "Each model is sound, but not beside the others.", FITTING),
    Group("Stacking layers", "Recipes with `slices`.", SLICING),
)
