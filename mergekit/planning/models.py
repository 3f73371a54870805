"""The models of a recipe, opened: headers, config and layout of each, and which of them gives what is not merged."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from mergekit.checkpoint.quantized import scale_target
from mergekit.errors import HubError, IncompatibleError, ModelNotFoundError, RecipeError
from mergekit.families.config import is_tied
from mergekit.families.layout import Layout, infer_layout, is_embedding, is_head
from mergekit.recipe import Recipe
from mergekit.refs import ModelReference

__all__ = ["Model", "Models", "open_models", "open_recipe"]


@dataclass(frozen=True, eq=False)  # no slots: the names below are looked up once
class Model:
    """One input model. ``tensors`` leaves out the scales of fp8 weights, which belong to their weights."""

    reference: ModelReference
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    layout: Layout

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
    """

    models: tuple[Model, ...]
    base: int | None
    donor: int

    def position(self, reference: ModelReference) -> int:
        """The position of a reference."""
        return next(i for i, model in enumerate(self.models) if model.reference == reference)

    def __getitem__(self, position: int) -> Model:
        """The model at ``position``."""
        return self.models[position]


def open_models(
    references: Sequence[ModelReference],
    base: ModelReference | None = None,
    *,
    place: Callable[[ModelReference], str | None] = lambda reference: None,
    base_quantization: str = "none",
    cache_dir: Path | None = None,
    quiet: bool = False,
    fetch: bool = True,
) -> Models:
    """Open ``references`` in this order. With ``fetch=False`` hub weights are planned from their headers.

    ``place`` says where a recipe names a model; faults point there.
    """
    models = []
    folders: dict[Path, ModelReference] = {}
    for reference in references:
        if reference.lora is not None:
            raise RecipeError(
                f"'{reference}': adapters in recipes are not built yet; bake the adapter into the model first",
                place=place(reference),
            )
        try:
            checkpoint = _open(reference, cache_dir, quiet, fetch)
        except (ModelNotFoundError, HubError) as error:
            where = f"{place(reference)}: " if place(reference) else ""
            here = "" if is_folder(reference) else f"there is no folder '{reference.model.path}' here, and "
            raise type(error)(f"{where}{here}{error}") from None
        folder = checkpoint.folder.resolve()
        twin = folders.setdefault(folder, reference)
        if twin.model.path != reference.model.path and is_folder(reference):
            raise RecipeError(
                f"'{reference}' and '{twin}' are the same folder; write it the same way everywhere",
                place=place(reference),
            )
        models.append(_model(reference, checkpoint))
    position = None if base is None else references.index(base)
    return Models(tuple(models), position, position if position is not None else 0)


def open_recipe(recipe: Recipe, *, cache_dir: Path | None = None, quiet: bool = False, fetch: bool = True) -> Models:
    """Open every model that ``recipe`` mentions."""
    return open_models(
        recipe.config.referenced_models(),
        recipe.config.base_model,
        place=lambda reference: recipe.text.place(_path_of(recipe, reference)),
        cache_dir=cache_dir,
        quiet=quiet,
        fetch=fetch,
    )


def has_remote_models(recipe: Recipe) -> bool:
    """Whether any model of the recipe has to come from the hub."""
    return not all(is_folder(reference) for reference in recipe.config.referenced_models())


def is_folder(reference: ModelReference) -> bool:
    """Whether a reference is to a folder: it exists, or its path has a form that no hub name has."""
    from mergekit.hub import is_local

    return os.path.isdir(os.path.expanduser(reference.model.path)) or is_local(reference.model)


def _open(reference: ModelReference, cache_dir: Path | None, quiet: bool, fetch: bool) -> Checkpoint:
    from mergekit import hub

    if is_folder(reference):
        return open_checkpoint(Path(os.path.expanduser(reference.model.path)))
    repository = None if fetch or hub.is_offline() else hub.open_repository(reference.model, cache_dir=cache_dir)
    sizes = {f.name: f.size for f in repository.files} if repository else {}
    if repository is None or not any(name.endswith(".safetensors") for name in sizes):
        return open_checkpoint(hub.download(reference.model, cache_dir=cache_dir, quiet=quiet))
    from mergekit.checkpoint.remote import open_remote_headers

    return open_remote_headers(
        str(reference.model), hub.fetch_small(repository), sizes, lambda *place: hub.read_range(repository, *place)
    )


def _model(reference: ModelReference, checkpoint: Checkpoint) -> Model:
    config = dict(checkpoint.config)
    if reference.override_architecture:
        config["architectures"] = [reference.override_architecture]
    scales = {n for n in checkpoint.tensors if (w := scale_target(n)) and w in checkpoint.tensors}
    scales = {n for n in scales if checkpoint.tensors[scale_target(n) or n].dtype.kind == "fp8"}
    quantised = {n.removesuffix("weight") for n, i in checkpoint.tensors.items() if i.dtype.kind == "fp8"}
    activations = {n for n in checkpoint.tensors if n.removesuffix("input_scale") in quantised}
    tensors = {n: i for n, i in checkpoint.tensors.items() if n not in scales and n not in activations}
    return Model(reference, checkpoint, config, tensors, infer_layout(tensors, config))


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


__all__ += ["check_architectures"]
