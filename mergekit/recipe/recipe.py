"""A recipe made valid: the configuration, its method, and every fault and oddity found before any file is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.errors import RecipeError, UsageError, nearest
from mergekit.methods import Method, get_method, method_names
from mergekit.methods.spec import Flag, Parameter, ParameterError, Real, once
from mergekit.recipe.schema import MergeConfiguration
from mergekit.recipe.text import RecipeText, text_of
from mergekit.recipe.validate import validate
from mergekit.refs import ModelReference

__all__ = ["EMBEDDING_OPTIONS", "EMBED_SLERP", "ParameterScope", "Recipe", "load_recipe"]

EMBED_SLERP = "embed_slerp"
"""The parameter of no method that has embeddings of another vocabulary merged by SLERP, with its ``t``."""
EMBEDDING_OPTIONS = (
    once(EMBED_SLERP, Flag(), False, help="merge embeddings and heads of two models by SLERP"),
    once("t", Real(), 0.5, help="the t of embed_slerp"),
)
"""What recipes with a tokenizer setting may say whatever their method is."""
_OLD_WORDS = frozenset({"int8_mask", EMBED_SLERP})
"""Parameter words that belong to no method but that recipes for arcee mergekit may carry anywhere."""

Path_ = tuple[str | int, ...]
Remark = tuple[str, str]
"""A place in the recipe, and what there is to say about it."""


@dataclass(frozen=True, slots=True, eq=False)
class ParameterScope:
    """One ``parameters:`` mapping of a recipe, and its path."""

    path: Path_
    values: Mapping[str, Any]
    model: ModelReference | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """A checked recipe. ``warnings`` are things a user should know; ``notes`` are accepted words without effect."""

    config: MergeConfiguration
    text: RecipeText
    method: Method
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def fault(self, message: str, *path: str | int) -> RecipeError:
        """A RecipeError that points at ``path``."""
        return RecipeError(message, place=self.text.place(path))


def load_recipe(source: str | Path | Mapping[str, Any] | MergeConfiguration) -> Recipe:
    """Read and check a recipe: a path to YAML, a mapping, or a configuration object.

    RecipeError says what is wrong and at which line and column.
    """
    if isinstance(source, MergeConfiguration):
        text = RecipeText("recipe", source.to_yaml(), source.model_dump(mode="json", exclude_defaults=True), None)
        config = source
    else:
        text = text_of(source)
        if isinstance(text.value, dict) and "experts" in text.value and "merge_method" not in text.value:
            raise RecipeError(
                "this is the recipe of a mixture of experts; use `mergekit moe` (with --dry-run to look first)",
                place=text.place(("experts",)),
            )
        config = validate(text, MergeConfiguration)
    try:
        method = get_method(config.merge_method)
    except UsageError as error:
        raise RecipeError(str(error), place=text.place(("merge_method",))) from None
    warnings: list[Remark] = []
    notes: list[Remark] = []
    recipe = Recipe(config, text, method, (), ())
    for scope in parameter_scopes(config):
        for name, value in scope.values.items():
            _check_parameter(recipe, scope, name, value, warnings, notes)
    for i, output in enumerate(config.slices or []):
        if output.residual_weight is not None:
            notes.append((text.place(("slices", i, "residual_weight")), "'residual_weight' changes nothing"))
    _check_models(recipe)
    return Recipe(config, text, method, (*text.duplicates, *_gathered(warnings)), _gathered(notes))


def _gathered(remarks: list[Remark]) -> tuple[str, ...]:
    """Each remark once, with the first place that it is about."""
    places: dict[str, list[str]] = {}
    for place, text in remarks:
        places.setdefault(text, []).append(place)
    more = {text: f" (and at {len(found) - 1} more places)" if len(found) > 1 else "" for text, found in places.items()}
    return tuple(f"{found[0]}: {text}{more[text]}" for text, found in places.items())


def parameter_scopes(config: MergeConfiguration) -> Iterator[ParameterScope]:
    """Every ``parameters:`` mapping of a recipe, in document order."""
    if config.parameters:
        yield ParameterScope(("parameters",), config.parameters)
    for name, values in (config.input_model_parameters or {}).items():
        yield ParameterScope(("input_model_parameters", name), values, ModelReference.parse(name))
    parts: list[tuple[Path_, Any]] = [((), config)]
    for name, module in (config.modules or {}).items():
        parts.append((("modules", name), module))
        if module.parameters:
            yield ParameterScope(("modules", name, "parameters"), module.parameters)
    for path, part in parts:
        for i, model in enumerate(part.models or []):
            if model.parameters:
                yield ParameterScope((*path, "models", i, "parameters"), model.parameters, model.model)
        for i, output in enumerate(part.slices or []):
            if output.parameters:
                yield ParameterScope((*path, "slices", i, "parameters"), output.parameters)
            for j, source in enumerate(output.sources):
                if source.parameters:
                    where = (*path, "slices", i, "sources", j, "parameters")
                    yield ParameterScope(where, source.parameters, source.model)


def _check_parameter(
    recipe: Recipe, scope: ParameterScope, name: str, value: Any, warnings: list[Remark], notes: list[Remark]
) -> None:
    """Refuse unknown names and impossible values; warn of what will be ignored."""
    place = recipe.text.place((*scope.path, name))
    parameter = recipe.method.parameter(name) or _of_embeddings(recipe.config, name)
    if parameter is None:
        others = [m for m in map(get_method, method_names()) if m.parameter(name)]
        if name in _OLD_WORDS:
            notes.append((place, f"'{name}' changes nothing with '{recipe.method.name}'"))
        elif others:
            options = [m for m in others if any(p.name == name for p in m.options)]
            names = ", ".join(m.name for m in others[:3]) + (" and others" if len(others) > 3 else "")
            owner = "methods that merge task vectors" if options else names
            text = f"'{recipe.method.name}' has no parameter '{name}' (it belongs to {owner}); ignored"
            warnings.append((place, text))
        else:
            known = [p.name for p in (*recipe.method.params, *recipe.method.options)]
            hint = nearest(name, known) if known else "It has none."
            raise RecipeError(f"'{recipe.method.name}' has no parameter '{name}'. {hint}", place=place)
        return
    if not parameter.used:
        notes.append((place, f"'{name}' {parameter.help}"))
        return
    if scope.model is not None and parameter.scope == "once":
        text = f"'{name}' is one value for all models and is not read here; move it to the top-level 'parameters'"
        warnings.append((place, f"{text} (ignored)"))
    elif scope.model is not None and parameter.scope == "each" and scope.model == recipe.config.base_model:
        warnings.append((place, f"'{name}' of the base model is not used by '{recipe.method.name}' (ignored)"))
    for path, scalar in _scalars(value):
        try:
            number = parameter.kind.read(scalar)
        except ParameterError as error:
            raise recipe.fault(f"'{name}': {error}", *scope.path, name, *path) from None
        usual = parameter.kind.usual if isinstance(parameter.kind, Real) else None
        if usual and not usual[0] <= float(number) <= usual[1]:
            where = recipe.text.place((*scope.path, name, *path))
            warnings.append((where, f"'{name}' is {number:g}, but is meant to lie in [{usual[0]:g}, {usual[1]:g}]"))


def _of_embeddings(config: MergeConfiguration, name: str) -> Parameter | None:
    """``embed_slerp``, where embeddings are aligned, and its ``t`` if it is used."""
    if config.tokenizer is None and config.tokenizer_source is None:
        return None
    is_used = any(EMBED_SLERP in scope.values for scope in parameter_scopes(config))
    return next((p for p in EMBEDDING_OPTIONS if p.name == name and (name == EMBED_SLERP or is_used)), None)


def _scalars(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    if isinstance(value, dict):
        yield from _scalars(value["value"], (*path, "value"))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _scalars(item, (*path, index))
    else:
        yield path, value


def _check_models(recipe: Recipe) -> None:
    """Refuse a missing base, models named twice, and counts that the method can't take."""
    config, method = recipe.config, recipe.method
    # A slice may bring its own base.
    if method.base == "required" and config.base_model is None:
        lacking = [i for i, output in enumerate(config.slices or []) if output.base_model is None]
        if not config.slices or lacking:
            place = ("slices", lacking[0]) if config.slices else ("merge_method",)
            raise recipe.fault(f"'{method.name}' needs a 'base_model'; add it at the top level", *place)
    groups: list[tuple[Path_, list[ModelReference], ModelReference | None]] = []
    parts: list[tuple[Path_, Any]] = [((), config), *(((("modules", n), m)) for n, m in (config.modules or {}).items())]
    for path, part in parts:
        if part.models:
            groups.append(((*path, "models"), [m.model for m in part.models], config.base_model))
        for i, output in enumerate(part.slices or []):
            sources = [s.model for s in output.sources]
            groups.append(((*path, "slices", i, "sources"), sources, output.base_model or config.base_model))
    for path, models, base in groups:
        for i, model in enumerate(models):
            if model in models[:i]:
                raise recipe.fault(f"'{model}' is listed twice here; keep one of them", *path, i)
        is_slice = path[-1] == "sources"
        if is_slice and base is not None and method.base == "required" and base not in models:
            raise recipe.fault(
                f"the base model '{base}' is not among the sources of this slice; add it with its layer_range", *path
            )
        count = len([m for m in models if m != base])
        if method.base != "optional":
            count += base in models or (not is_slice and base is not None)
        if not method.takes(count):
            wanted = f"{method.least}" if method.most == method.least else f"at least {method.least}"
            including = {"required": ", the base included", "optional": " besides the base", "ignored": ""}[method.base]
            raise recipe.fault(f"'{method.name}' takes {wanted} model(s){including}, but this gives {count}", *path)
    named = config.referenced_models()
    for name in config.input_model_parameters or {}:
        if ModelReference.parse(name) not in named:
            raise recipe.fault(
                f"'{name}' is not a model of this recipe. {nearest(name, map(str, named))}",
                "input_model_parameters",
                name,
            )
