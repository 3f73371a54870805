"""Random recipes for every merge method of arcee mergekit 0.1.5: what both tools are asked to do.

Recipe number n of a seed is always the same. ``oddity`` names what is out of the ordinary about it, if anything is: an
edge value, a mistake that a tool should refuse, a model that does not quite fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import FINE_TUNES, LAYERS

Random = np.random.Generator
Draw = Callable[[Random], Any]
Parameters = dict[str, Any]


def one_of(*values: Any) -> Draw:
    """Draw one of a few values."""
    return lambda random: values[int(random.integers(len(values)))]


def number(low: float, high: float) -> Draw:
    """Draw a number with two decimals."""
    return lambda random: round(float(random.uniform(low, high)), 2)


@dataclass(frozen=True)
class Space:
    """What recipes of a method are drawn from: how many fine-tunes, the base, parameters per model and shared ones."""

    least: int = 1
    most: int = 3
    base: str = "required"
    each: Mapping[str, Draw] = field(default_factory=dict)
    shared: Mapping[str, Draw] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    random: bool = False


FLAG = one_of(True, False)
WEIGHT = one_of(0.3, 0.5, 0.7, 1, 1, 1.5, 2, -0.4)
DENSITY = one_of(0.1, 0.25, 0.33, 0.5, 0.5, 0.7, 0.9, 1.0)
TASK = {"normalize": FLAG, "rescale": FLAG, "lambda": one_of(1, 0.5, 1.3), "int8_mask": FLAG}


def _task(random: bool = False, **each: Draw) -> Space:
    return Space(each={"weight": WEIGHT, **each}, shared=TASK, required=("weight",), random=random)


_DELLA = {"density": one_of(0.3, 0.5, 0.6, 0.7, 1.0), "epsilon": one_of(0.05, 0.1, 0.15, 0.29)}
_BREADCRUMBS = {"density": DENSITY, "gamma": one_of(0, 0.01, 0.05, 0.2, 0.6)}
SPACES: dict[str, Space] = {
    "linear": Space(base="ignored", each={"weight": WEIGHT}, shared={"normalize": FLAG}, required=("weight",)),
    "slerp": Space(1, 1, shared={"t": number(-0.1, 1.1)}, required=("t",)),
    "nuslerp": Space(
        2, 2, "optional", {"weight": WEIGHT}, {"nuslerp_flatten": FLAG, "nuslerp_row_wise": FLAG}, ("weight",)
    ),
    "multislerp": Space(
        1, 3, "optional", {"weight": WEIGHT}, {"normalize_weights": FLAG, "eps": one_of("1e-8", 1e-6)}, ("weight",)
    ),
    "karcher": Space(base="ignored", shared={"max_iter": one_of(1, 5, 10, 50), "tol": one_of("1e-5", 1e-8, 1e-3)}),
    "task_arithmetic": _task(density=DENSITY),
    "ties": _task(density=DENSITY),
    "dare_linear": _task(True, density=DENSITY),
    "dare_ties": _task(True, density=DENSITY),
    "breadcrumbs": _task(**_BREADCRUMBS),
    "breadcrumbs_ties": _task(**_BREADCRUMBS),
    "della": _task(True, **_DELLA),
    "della_linear": _task(True, **_DELLA),
    "model_stock": Space(2, 3, shared={"filter_wise": FLAG}),
    "nearswap": Space(1, 1, shared={"t": one_of("1e-4", 1e-3, 0.004, 0.02, 0.5)}, required=("t",)),
    "arcee_fusion": Space(1, 1),
    "sce": Space(shared={"select_topk": one_of(0.1, 0.5, 0.9, 1.0), "int8_mask": FLAG}),
    "ram": Space(shared={"epsilon": one_of("1e-5", 1e-3, 0.005)}),
    "ramplus_tl": Space(
        shared={"epsilon": one_of("1e-5", 1e-3, 0.005), "r": number(0, 0.9), "alpha": one_of(0.2, 0.5, 2)}
    ),
    "passthrough": Space(1, 1, "none", {"scale": number(-1, 2)}),
}
METHODS = tuple(SPACES)
ODDITIES = (
    "misspelt parameter",
    "unknown key",
    "too many models",
    "missing weight",
    "same model twice",
    "base not among the sources",
    "tied model",
    "wide vocabulary",
    "weights that sum to zero",
    "shared parameter under a model",
    "layers beyond the model",
    "zero density",
    "zero weight",
    "impossible epsilon",
    "only the base",
    "slices of unequal length",
    "wrong dtype name",
    "parameter of another method",
    "texts for flags and numbers",
)


@dataclass(frozen=True)
class Case:
    """One recipe. ``random``: the method draws masks."""

    number: int
    method: str
    recipe: dict[str, Any]
    oddity: str
    random: bool


def case(seed: int, index: int, models: Path) -> Case:
    """Recipe ``index`` of ``seed`` on the models in folder ``models``."""
    method = METHODS[index % len(METHODS)]
    space = SPACES[method]
    random = np.random.default_rng([seed, index])
    half = random.random() < 0.12
    count = int(random.integers(space.least, space.most + 1))
    tunes = [FINE_TUNES[i] for i in random.permutation(len(FINE_TUNES))[:count]]
    if count == 2 and random.random() < 0.4:
        tunes = ["tiny", "small"]  # deltas as most fine-tunes have them
    names = list(tunes)
    recipe: dict[str, Any] = {"merge_method": method}
    base = space.base == "required" or (space.base != "none" and random.random() < 0.4)
    listed = base and random.random() < 0.5
    if base:
        recipe["base_model"] = _path(models, "base", half)
    if listed:
        names.insert(int(random.integers(len(names) + 1)), "base")
    everywhere = space.base == "ignored" and base and not listed  # an implicit base needs its weight from somewhere
    entries, shared = _parameters(random, space, names, everywhere)
    sources: list[dict[str, Any]] = [{"model": _path(models, name, half)} for name in names]
    for source, parameters in zip(sources, entries, strict=True):
        if parameters:
            source["parameters"] = parameters
    kind = random.random()
    if base and not listed and kind < 0.25:
        sources.append({"model": recipe["base_model"]})  # slices have no implicit base
    if kind < 0.25:
        recipe["slices"] = _slices(random, sources, shared)
    elif kind < 0.32:
        recipe["modules"] = {"default": {"models": sources, **({"parameters": shared} if shared else {})}}
    else:
        recipe["models"] = sources
        if shared:
            recipe["parameters"] = shared
    _types(random, recipe, half)
    oddity = ""
    turn, place = divmod(index, len(METHODS))
    for step in range(len(ODDITIES)) if turn % 3 == 2 else ():  # every third round, another oddity for each method
        chosen = ODDITIES[(7 * (place + step) + 4 * (turn // 3)) % len(ODDITIES)]
        if oddity := _make_odd(chosen, recipe, sources, space, models):
            break
    return Case(index, method, recipe, oddity, space.random)


def _path(models: Path, name: str, half: bool) -> str:
    return str(models / (f"{name}-bf16" if half else name))


def _parameters(
    random: Random, space: Space, names: list[str], everywhere: bool
) -> tuple[list[Parameters], Parameters]:
    """The parameters under each model, and those for all of them."""
    entries: list[Parameters] = [{} for _ in names]
    shared: Parameters = {}
    for name, draw in space.shared.items():
        if name in space.required or random.random() < 0.6:
            shared[name] = _setting(random, draw, numeric=draw is not FLAG and name != "max_iter")
    for name, draw in space.each.items():
        if name not in space.required and random.random() < 0.25:
            continue
        if everywhere or random.random() < 0.25:
            shared[name] = _setting(random, draw)
        if name not in shared or random.random() < 0.5:
            for entry, model in zip(entries, names, strict=True):
                if model != "base" or space.base == "ignored":
                    entry[name] = _setting(random, draw, complete=name not in shared)
    return entries, shared


def _setting(random: Random, draw: Draw, numeric: bool = True, complete: bool = True) -> Any:
    """A value, a gradient over depth, or values by filter; ``complete``: there is a value for every tensor."""
    kind = random.random()

    def value() -> Any:
        if numeric and random.random() < 0.2:
            return [draw(random) for _ in range(int(random.integers(2, 6)))]
        return draw(random)

    if kind < 0.7:
        return value()
    if kind < 0.73 and complete:
        return {"value": value()}
    if kind < 0.76 and not complete:
        return {"value": value(), "filter": "mlp"}
    filters = [("self_attn", "mlp"), ("q_proj", "norm"), ("layers.1.", "embed"), ("lm_head", "down_proj")]
    chosen = [{"filter": f, "value": value()} for f in filters[int(random.integers(4))]]
    last = [{"value": value()}, {"filter": "*", "value": value()}][int(random.integers(2))]
    return [*chosen, last] if complete else chosen


def _slices(random: Random, sources: list[dict[str, Any]], shared: Parameters) -> list[dict[str, Any]]:
    """Two slices over all sources; some shift a source by a layer, some repeat layers."""
    bounds = [[(0, 2), (2, 4)], [(0, 3), (1, 4)], [(0, 1), (1, 4)]][int(random.integers(3))]
    found = []
    for start, end in bounds:
        moved = []
        for source in sources:
            shift = int(random.random() < 0.2 and end < LAYERS)
            moved.append({**source, "layer_range": [start + shift, end + shift]})
        found.append({"sources": moved, **({"parameters": dict(shared)} if shared else {})})
    return found


def _types(random: Random, recipe: dict[str, Any], half: bool) -> None:
    if half:
        recipe.update([{}, {"dtype": "bfloat16"}, {"dtype": "float32"}][int(random.integers(3))])
    elif random.random() < 0.15:
        choices: list[dict[str, str]] = [
            {"dtype": "bfloat16"}, {"out_dtype": "bfloat16"}, {"dtype": "float32", "out_dtype": "float16"}
        ]  # fmt: skip
        recipe.update(choices[int(random.integers(3))])


def _make_odd(oddity: str, recipe: dict[str, Any], sources: list[dict[str, Any]], space: Space, models: Path) -> str:
    """Give the recipe its oddity; the empty word if the oddity has no meaning for it."""
    tunes = [s for s in sources if not Path(s["model"]).name.startswith("base")]
    half = tunes[0]["model"].endswith("-bf16")
    whole = "models" in recipe
    top = recipe.setdefault("parameters", {})
    if oddity == "misspelt parameter":
        top["densty"] = 0.5
    elif oddity == "unknown key":
        recipe["merge_methd"] = "linear"
    elif oddity == "too many models" and whole and space.most < 3:
        recipe["models"] = [{"model": _path(models, n, half), "parameters": {"weight": 1}} for n in FINE_TUNES]
    elif oddity == "missing weight" and "weight" in space.required:
        tunes[0].pop("parameters", None)
        top.pop("weight", None)
    elif oddity == "same model twice" and whole:
        recipe["models"] = [*sources, tunes[0]]
    elif oddity == "base not among the sources" and "slices" in recipe and "base_model" in recipe:
        for piece in recipe["slices"]:
            piece["sources"] = [s for s in piece["sources"] if s["model"] != recipe["base_model"]]
    elif oddity == "weights that sum to zero" and "weight" in space.required and len(tunes) > 1 and whole:
        recipe["models"] = [
            {"model": s["model"], "parameters": {"weight": w}} for s, w in zip(tunes[:2], (1, -1), strict=True)
        ]
        if space.base != "required":
            recipe.pop("base_model", None)
        recipe["parameters"] = {}
    elif oddity == "shared parameter under a model" and "lambda" in space.shared and whole:
        tunes[0].setdefault("parameters", {})["lambda"] = 3.0
    elif oddity == "layers beyond the model" and "slices" in recipe:
        for source in recipe["slices"][-1]["sources"]:
            source["layer_range"] = [source["layer_range"][0] + 2, source["layer_range"][1] + 2]
    elif oddity == "zero density" and "density" in space.each and whole:
        tunes[0].setdefault("parameters", {})["density"] = 0
    elif oddity == "zero weight" and "weight" in space.required and whole:
        tunes[0].setdefault("parameters", {})["weight"] = 0
    elif oddity == "impossible epsilon" and "epsilon" in space.each and whole:
        tunes[0].setdefault("parameters", {}).update(density=0.9, epsilon=0.2)
    elif oddity == "only the base" and whole and "base_model" in recipe:
        recipe["models"] = [{"model": recipe["base_model"], "parameters": {"weight": 1}}]
    elif oddity == "slices of unequal length" and "slices" in recipe and len(sources) > 1:
        recipe["slices"][0]["sources"][0]["layer_range"] = [0, 1 + recipe["slices"][0]["sources"][0]["layer_range"][1]]
    elif oddity == "parameter of another method":
        top.update({} if "density" in space.each else {"density": 0.5})
        top.update({} if "int8_mask" in space.shared else {"int8_mask": True})
    elif oddity == "texts for flags and numbers" and "lambda" in space.shared:
        top.update({"lambda": "5e-1", "normalize": "false"})
    elif oddity == "wrong dtype name":
        recipe["dtype"] = "bf16"
    elif oddity in ("tied model", "wide vocabulary"):
        old, new = Path(tunes[0]["model"]), _path(models, oddity.partition(" ")[0], half)
        recipe.update(json.loads(json.dumps(recipe).replace(f'{old}"', f'{new}"')))
    else:
        oddity = ""
    if not top:
        recipe.pop("parameters", None)
    return oddity
