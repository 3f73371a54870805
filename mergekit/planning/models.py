"""The models of a recipe, opened: headers, config and layout of each, and which of them gives what is not merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.adapters import Adapter
from mergekit.checkpoint import Checkpoint, TensorInfo
from mergekit.checkpoint.quantized import scale_target
from mergekit.errors import HubError, IncompatibleError, MergekitError, ModelNotFoundError, RecipeError
from mergekit.families.config import is_tied
from mergekit.families.layout import Layout, infer_layout, is_embedding, is_head
from mergekit.planning.adapted import Change, FourBit, adapt
from mergekit.planning.locate import Locator, is_folder, refuse_misplaced
from mergekit.refs import ModelPath, ModelReference

if TYPE_CHECKING:
    from mergekit.downloads import Told
    from mergekit.recipe import Recipe

__all__ = ["Model", "Models", "check_architectures", "has_remote_models", "open_models", "open_recipe"]


@dataclass(frozen=True, eq=False)  # no slots: the names below are looked up once
class Model:
    """One input model. ``tensors`` are those that it computes with, whatever they look like on disk.

    With an adapter, they are those of the two together: ``changes`` says what gives a tensor that is not simply read,
    ``four_bit`` which others were quantised, and ``adapter`` is the adapter's position in ``Models.adapters``.
    ``planning.leaf`` turns a name into what is read.
    """

    reference: ModelReference
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    layout: Layout
    changes: Mapping[str, Change] = field(default_factory=dict)
    four_bit: FourBit | None = None
    adapter: int | None = None

    @cached_property
    def embedding(self) -> str | None:
        """The name of the input embeddings; of several tables, that beside the main layers."""
        found = [name for name in self.tensors if is_embedding(name)]
        parent = self.layout.main.prefix[:-1].rpartition(".")[0] if self.layout.main else ""
        return next((name for name in found if name.startswith(parent)), found[0] if found else None)

    @cached_property
    def head(self) -> str | None:
        """The name of the stored head, unless the config says that the head is tied to the embeddings."""
        found = [name for name in self.tensors if is_head(name)]
        name = next((name for name in found if name.endswith("lm_head.weight")), found[0] if found else None)
        return None if name is not None and is_tied(self.config) and self.embedding else name


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """All models of a recipe in order of first mention; ``base`` and ``donor`` are positions in it.

    The donor (the base, else the first) gives the config, the tokenizer and the names of the output's tensors.
    ``adapters`` are those of all models, each once; in a plan they are the sources after the models.
    """

    models: tuple[Model, ...]
    base: int | None
    donor: int
    adapters: tuple[tuple[ModelPath, Adapter], ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def position(self, reference: ModelReference) -> int:
        """The position of a reference."""
        return next(i for i, model in enumerate(self.models) if model.reference == reference)

    def __getitem__(self, position: int) -> Model:
        """The model at ``position``."""
        return self.models[position]

    def tokenizer_of(self, position: int) -> tuple[int, Path]:
        """The source whose tokenizer fits the model at ``position``, and its folder.

        That is the adapter where it brings embeddings with another number of rows, and a tokenizer.
        """
        model = self.models[position]
        if model.adapter is not None and model.embedding is not None:
            folder = self.adapters[model.adapter][1].folder
            change = model.changes.get(model.embedding)
            is_resized = (
                change is not None
                and change.saved is not None
                and (change.saved.shape[0] != _logical(model.checkpoint, model.checkpoint.tensors[change.of]).shape[0])
            )
            if is_resized and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
                return len(self.models) + model.adapter, folder
        return position, model.checkpoint.folder


def open_models(
    references: Sequence[ModelReference],
    base: ModelReference | None = None,
    *,
    place: Callable[[ModelReference], str | None] = lambda reference: None,
    recipe: Path | None = None,
    base_quantization: str = "none",
    cache_dir: Path | None = None,
    told: Told = lambda model, done, total: None,
    fetch: bool = True,
) -> Models:
    """Open ``references`` in this order, adapters included.

    ``place`` says where a recipe names a model; faults point there. ``recipe`` is its file. ``base_quantization``: to
    what 4-bit numbers the models below adapters are quantised first. With ``fetch=False`` hub weights are planned from
    their headers. ``told`` hears of downloads.
    """
    locator = Locator(cache_dir=cache_dir, told=told, fetch=fetch)
    models: list[Model] = []
    folders: dict[Path, ModelReference] = {}
    warnings: list[str] = []
    notes: list[str] = []

    def fault(error: MergekitError, text: str = "") -> MergekitError:
        return type(error)(f"{place(reference)}: {text}{error}" if place(reference) else f"{text}{error}")

    if recipe is not None:  # before the hub is asked for any of them
        for reference in references:
            try:
                refuse_misplaced(reference, recipe)
            except ModelNotFoundError as error:
                raise fault(error) from None
    for reference in references:
        path = reference.model
        try:
            checkpoint = locator.checkpoint(path)
            path = reference.lora or path
            adapter = locator.adapter(path) if reference.lora else None
        except (ModelNotFoundError, HubError) as error:
            raise fault(error, locator.explain(path)) from None
        folder = checkpoint.folder.resolve()
        twin = folders.setdefault(folder, reference)
        if twin.model.path != reference.model.path and is_folder(reference):
            raise RecipeError(
                f"'{reference}' and '{twin}' are the same folder; write it the same way everywhere",
                place=place(reference),
            )
        model = _model(reference, checkpoint)
        if adapter is not None:
            try:
                model, more, remarks = adapt(model, adapter, base_quantization)
            except IncompatibleError as error:
                raise fault(error) from None
            model = dataclasses.replace(model, adapter=[a for _, a in locator.adapters()].index(adapter))
            warnings += more
            notes += remarks
        models.append(model)
    position = None if base is None else references.index(base)
    return Models(
        tuple(models),
        position,
        position if position is not None else 0,
        locator.adapters(),
        tuple(warnings),
        tuple(notes),
    )


def open_recipe(
    recipe: Recipe,
    *,
    cache_dir: Path | None = None,
    told: Told = lambda model, done, total: None,
    fetch: bool = True,
) -> Models:
    """Open every model that ``recipe`` mentions."""
    return open_models(
        recipe.config.referenced_models(),
        recipe.config.base_model,
        place=lambda reference: recipe.text.place(_path_of(recipe, reference)),
        recipe=recipe.text.file,
        base_quantization=recipe.config.base_quantization,
        cache_dir=cache_dir,
        told=told,
        fetch=fetch,
    )


def has_remote_models(recipe: Recipe) -> bool:
    """Whether any model of the recipe has to come from the hub."""
    return not all(is_folder(reference) for reference in recipe.config.referenced_models())


def _model(reference: ModelReference, checkpoint: Checkpoint) -> Model:
    config = dict(checkpoint.config)
    if reference.override_architecture:
        config["architectures"] = [reference.override_architecture]
    scales = {n for n in checkpoint.tensors if (w := scale_target(n)) and w in checkpoint.tensors}
    scales = {n for n in scales if checkpoint.tensors[scale_target(n) or n].dtype.kind == "fp8"}
    quantised = {n.removesuffix("weight") for n, i in checkpoint.tensors.items() if i.dtype.kind == "fp8"}
    activations = {n for n in checkpoint.tensors if n.removesuffix("input_scale") in quantised}
    tables = scales | activations | checkpoint.tables
    tensors = {n: _logical(checkpoint, i) for n, i in checkpoint.tensors.items() if n not in tables}
    return Model(reference, checkpoint, config, tensors, infer_layout(tensors, config))


def _logical(checkpoint: Checkpoint, info: TensorInfo) -> TensorInfo:
    """A tensor as the model has it; on disk its elements may be packed."""
    packed = checkpoint.packed.get(info.name)
    return info if packed is None else dataclasses.replace(info, dtype=packed.dtype, shape=packed.shape)


def _path_of(recipe: Recipe, reference: ModelReference) -> tuple[str | int, ...]:
    config = recipe.config
    parts: list[tuple[tuple[str | int, ...], Any]] = [((), config)]
    parts += [(("modules", name), module) for name, module in (config.modules or {}).items()]
    for path, part in parts:
        for i, entry in enumerate(part.models or []):
            if entry.model == reference:
                return (*path, "models", i, "model")
        for i, output in enumerate(part.slices or []):
            for j, source in enumerate(output.sources):
                if source.model == reference:
                    return (*path, "slices", i, "sources", j, "model")
    return ("base_model",)


def check_architectures(models: Models, *, allow_crimes: bool) -> list[str]:
    """Refuse models whose configs name different architectures, unless ``allow_crimes``; then warn."""
    donor = models[models.donor]
    warnings = []
    for model in models.models:
        mine, theirs = model.config.get("architectures"), donor.config.get("architectures")
        if mine and theirs and mine != theirs:
            text = f"{model.reference} is a {mine[0]}, but {donor.reference} is a {theirs[0]}"
            if not allow_crimes:
                raise IncompatibleError(
                    f"{text}; merge models of one architecture, or pass --allow-crimes to try anyway"
                )
            warnings.append(
                f"{text}; merged all the same (--allow-crimes), tensor by tensor where names and shapes agree"
            )
    return warnings
