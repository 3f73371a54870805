"""A mixture's recipe made valid: the configuration, and the merge recipe of what its experts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.errors import RecipeError
from mergekit.moe.schema import RANDOM_MODES, Expert, MoeConfiguration
from mergekit.recipe import Recipe, load_recipe
from mergekit.recipe.text import RecipeText, text_of
from mergekit.recipe.validate import validate
from mergekit.refs import ModelReference

__all__ = ["MoeRecipe", "load_moe_recipe"]


@dataclass(frozen=True, slots=True, eq=False)
class MoeRecipe:
    """A checked recipe of a mixture. ``shared`` merges what is no expert: attention, norms, embeddings, head."""

    config: MoeConfiguration
    text: RecipeText
    shared: Recipe
    warnings: tuple[str, ...]

    def fault(self, message: str, *path: str | int) -> RecipeError:
        """A RecipeError that points at ``path``."""
        return RecipeError(message, place=self.text.place(path))

    @property
    def uses_prompts(self) -> bool:
        """Whether the routers are made from prompts."""
        return self.config.gate_mode not in RANDOM_MODES

    def references(self) -> list[ModelReference]:
        """Every model once: the base, the experts in order, then models that only the shared weights come from."""
        found = dict.fromkeys([self.config.base_model, *(e.source_model for e in self.config.experts)])
        found.update(dict.fromkeys(self.shared.config.referenced_models()))
        return list(found)

    def path_of(self, reference: ModelReference) -> tuple[str | int, ...]:
        """Where the recipe first names a model."""
        if reference == self.config.base_model:
            return ("base_model",)
        for i, expert in enumerate(self.config.experts):
            if expert.source_model == reference:
                return ("experts", i, "source_model")
        return ("attention",)


def load_moe_recipe(
    source: str | Path | Mapping[str, Any] | MoeConfiguration, *, allow_all_same: bool = False
) -> MoeRecipe:
    """Read and check the recipe of a mixture: a path to YAML, a mapping, or a configuration object.

    ``allow_all_same``: experts that are all one model are no fault. RecipeError says what is wrong and where.
    """
    if isinstance(source, MoeConfiguration):
        source = source.model_dump(mode="json", exclude_defaults=True)
    text = text_of(source)
    if "merge_method" in text.value and "experts" not in text.value:
        raise RecipeError("this is the recipe of a merge; use `mergekit merge`", place=text.place(("merge_method",)))
    config = validate(text, MoeConfiguration)
    recipe = MoeRecipe(config, text, _shared(config, text), (*text.duplicates, *_alike(text, config)))
    if config.shared_experts:
        raise recipe.fault(
            "neither Mixtral nor Phi-3 MoE has shared experts; leave 'shared_experts' out", "shared_experts"
        )
    if recipe.uses_prompts:
        _check_prompts(recipe)
    models = [(e.source_model, e.noise_scale or 0, e.residual_scale) for e in config.experts]
    if len(models) > 1 and len(set(models)) == 1 and not models[0][1] and not allow_all_same:
        raise recipe.fault(
            f"all {len(models)} experts are '{models[0][0]}', so routing changes nothing until the result is trained; "
            f"name different models, or pass --i-understand-this-is-not-useful-without-training",
            "experts",
        )
    return recipe


def _shared(config: MoeConfiguration, text: RecipeText) -> Recipe:
    """The merge that gives the weights which the experts share."""
    experts = [reference.dump() for reference in dict.fromkeys(e.source_model for e in config.experts)]
    merge: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": config.base_model.dump()}]}
    if config.attention == "average":
        merge = {"merge_method": "linear", "models": [{"model": e} for e in experts], "parameters": {"weight": 1.0}}
    elif not isinstance(config.attention, str):
        merge = {
            "merge_method": config.attention.merge_method,
            "models": config.attention.models or [{"model": e} for e in experts],
            "parameters": config.attention.parameters or {},
        }
        from mergekit.methods import get_method, method_names

        name = config.attention.merge_method
        if name in method_names() and get_method(name).base == "required":
            merge["base_model"] = config.base_model.dump()
    for key in ("dtype", "seed"):
        if getattr(config, key) is not None:
            merge[key] = getattr(config, key)
    if config.base_quantization != "none":
        merge["base_quantization"] = config.base_quantization
    try:
        return load_recipe(merge)
    except RecipeError as error:
        message = str(error).removeprefix(f"{error.place}: ") if error.place else str(error)
        raise RecipeError(message, place=text.place(("attention",))) from None


def _check_prompts(recipe: MoeRecipe) -> None:
    """Refuse experts without prompts, and experts that can't be told apart by theirs."""
    experts = recipe.config.experts
    for i, expert in enumerate(experts):
        if not expert.positive_prompts and not expert.positive_prompts_file:
            raise recipe.fault(
                f"expert {i} ('{expert.source_model}') has no 'positive_prompts'; gate_mode "
                f"'{recipe.config.gate_mode}' makes routers from them (gate_mode: random needs none)",
                "experts",
                i,
            )
    sets = [_prompt_set(expert) for expert in experts]
    if len(sets) > 1 and len(set(sets)) == 1:
        raise recipe.fault("all experts have the same prompts, so no router can tell them apart; say what each is for",
                           "experts")  # fmt: skip


def _alike(recipe_text: RecipeText, config: MoeConfiguration) -> list[str]:
    """A warning for each expert with the prompts of an earlier one."""
    sets = [_prompt_set(expert) for expert in config.experts]
    return [
        f"{recipe_text.place(('experts', i))}: expert {i} has the prompts of expert {sets.index(mine)}, "
        f"so the router can't tell them apart"
        for i, mine in enumerate(sets)
        if mine in sets[:i] and config.gate_mode not in RANDOM_MODES
    ]


def _prompt_set(expert: Expert) -> tuple[Any, ...]:
    return (
        tuple(sorted(p.strip() for p in expert.positive_prompts or ())),
        tuple(sorted(p.strip() for p in expert.negative_prompts or ())),
        expert.positive_prompts_file,
        expert.negative_prompts_file,
    )
