"""Where a reference leads: a folder here, or a repository on the hub, opened as a checkpoint or an adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit.adapters import Adapter, open_adapter
from mergekit.adapters.adapter import WEIGHTS
from mergekit.checkpoint import Checkpoint, open_checkpoint
from mergekit.errors import HubError, ModelNotFoundError
from mergekit.refs import ModelPath, ModelReference, but_folder, no_folder

if TYPE_CHECKING:
    from mergekit.downloads import Told

__all__ = ["Locator", "is_folder", "reference_of", "refuse_misplaced", "small_folder"]


def reference_of(text: str) -> ModelReference:
    """The reference that a command line names: a folder that is there, whatever its name, or what ``parse`` reads."""
    return ModelReference(ModelPath(text)) if os.path.isdir(os.path.expanduser(text)) else ModelReference.parse(text)


def is_folder(reference: ModelReference) -> bool:
    """Whether nothing of a reference comes from the hub: model and adapter exist here, or have paths of folders."""
    return all(map(_is_folder, filter(None, (reference.model, reference.lora))))


def _is_folder(path: ModelPath) -> bool:
    from mergekit.hub import is_local

    return os.path.isdir(os.path.expanduser(path.path)) or is_local(path)


def refuse_misplaced(reference: ModelReference, recipe: Path) -> None:
    """ModelNotFoundError if a path of the file ``recipe`` leads nowhere from here, but from where the file is.

    A name with a revision is one on the hub.
    """
    for path in filter(None, (reference.model, reference.lora)):
        there = recipe.parent / path.path
        if path.revision is None and not os.path.exists(os.path.expanduser(path.path)) and os.path.isdir(there):
            raise ModelNotFoundError(
                f"no folder '{path.path}' here, but '{there}' is there: paths in a recipe begin in the current folder; "
                f"run the command in {recipe.parent}, or write the path from here"
            )


def _nowhere(path: ModelPath) -> str:
    return f"there is no folder '{path.path}' in the current folder{but_folder(path.path)}, and "


class Locator:
    """Opens each path once. Without ``fetch``, weights on the hub are known by their headers."""

    def __init__(self, *, cache_dir: Path | None, fetch: bool, told: Told = lambda model, done, total: None) -> None:
        self._cache_dir, self._fetch, self._told = cache_dir, fetch, told
        self._checkpoints: dict[ModelPath, Checkpoint] = {}
        self._adapters: dict[ModelPath, Adapter] = {}

    def checkpoint(self, path: ModelPath) -> Checkpoint:
        """The model at ``path``."""
        if path not in self._checkpoints:
            self._checkpoints[path] = self._open_checkpoint(path)
        return self._checkpoints[path]

    def adapter(self, path: ModelPath) -> Adapter:
        """The adapter at ``path``."""
        if path not in self._adapters:
            self._adapters[path] = self._open_adapter(path)
        return self._adapters[path]

    def adapters(self) -> tuple[tuple[ModelPath, Adapter], ...]:
        """Every adapter that was opened, in order."""
        return tuple(self._adapters.items())

    def explain(self, path: ModelPath) -> str:
        """What to say before a fault of the hub, for a path that might have been meant as a folder."""
        return "" if _is_folder(path) else _nowhere(path)

    def _open_checkpoint(self, path: ModelPath) -> Checkpoint:
        from mergekit import hub

        if _is_folder(path):
            return open_checkpoint(Path(os.path.expanduser(path.path)))
        repository = None if self._fetch or hub.is_offline() else hub.open_repository(path, cache_dir=self._cache_dir)
        sizes = {f.name: f.size for f in repository.files} if repository else {}
        if repository is None or not any(name.endswith(".safetensors") for name in sizes):
            return open_checkpoint(hub.download(path, cache_dir=self._cache_dir, told=self._told))
        from mergekit.checkpoint.remote import open_remote_headers

        return open_remote_headers(
            str(path),
            hub.fetch_small(repository, told=self._told),
            sizes,
            lambda *place: hub.read_range(repository, *place),
        )

    def _open_adapter(self, path: ModelPath) -> Adapter:
        from mergekit import hub

        if _is_folder(path):
            return open_adapter(Path(os.path.expanduser(path.path)))
        repository = None if self._fetch or hub.is_offline() else hub.open_repository(path, cache_dir=self._cache_dir)
        sizes = {f.name: f.size for f in repository.files} if repository else {}
        if repository is None or WEIGHTS[0] not in sizes:
            return open_adapter(hub.download(path, cache_dir=self._cache_dir, told=self._told))
        from mergekit.checkpoint.remote import remote_header

        header = remote_header(
            str(path), WEIGHTS[0], sizes[WEIGHTS[0]], lambda *place: hub.read_range(repository, *place)
        )
        return open_adapter(hub.fetch_small(repository, told=self._told), header)


def small_folder(path: ModelPath, cache_dir: Path | None) -> Path:
    """A folder with the small files of a model: configs, tokenizer. Weights on the hub stay there."""
    from mergekit import hub

    if _is_folder(path):
        folder = Path(os.path.expanduser(path.path))
        if not folder.is_dir():
            raise ModelNotFoundError(no_folder(path.path))
        return folder
    try:
        return hub.fetch_small(hub.open_repository(path, cache_dir=cache_dir))
    except (ModelNotFoundError, HubError) as error:
        raise type(error)(f"{_nowhere(path)}{error}") from None
