"""Publish a model folder on the hub: what goes up, a check of it, one commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit.api.verify import verify_model
from mergekit.errors import CheckpointError, UsageError, some_of

__all__ = ["Upload", "find_upload", "push_model"]


@dataclass(frozen=True, slots=True)
class Upload:
    """What a push sends: names and sizes in bytes; ``left`` are the things in the folder that stay here.

    ``paths`` are folders of this machine that the recipe names, for everyone to read.
    """

    folder: Path
    repo_id: str
    files: tuple[tuple[str, int], ...]
    left: tuple[str, ...]
    paths: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(size for _, size in self.files)


def find_upload(folder: Path, repo_id: str) -> Upload:
    """What of ``folder`` is part of the model in it; UsageError if the model is not complete.

    Of a model that mergekit wrote, those are the files of its manifest; of others, what a merge would take over.
    """
    from mergekit.checkpoint import open_checkpoint
    from mergekit.output.manifest import read_manifest
    from mergekit.output.paths import local_paths
    from mergekit.output.staging import STAGING

    checkpoint = open_checkpoint(folder)
    if (folder / STAGING).exists():
        raise UsageError(f"{folder} holds a merge that did not end ({STAGING}): run its command again, then push")
    if not checkpoint.config:
        raise UsageError(f"{folder} has no config.json, so no program could load it: add one, then push")
    present = sorted(path.name for path in folder.iterdir())
    weights = [file.name for file in checkpoint.files]
    small = _small_files(folder, weights)
    names = [*weights, *(name for name in small if name not in weights and (folder / name).is_file())]
    sizes = tuple((name, (folder / name).stat().st_size) for name in names)
    manifest = read_manifest(folder)
    recipe = folder / manifest.recipe_name if manifest else None
    text = recipe.read_text("utf-8", "replace") if recipe and recipe.is_file() else ""
    left = tuple(name for name in present if name not in names)
    return Upload(folder, repo_id, sizes, left, tuple(local_paths(text)))


def _small_files(folder: Path, weights: list[str]) -> list[str]:
    """The names of the files beside the weights that make up a model, in order."""
    from mergekit.output.manifest import MANIFEST, read_manifest
    from mergekit.output.names import REPORT
    from mergekit.output.staging import holds_weights
    from mergekit.planning.document import files_to_copy

    manifest = read_manifest(folder)
    ours = files_to_copy(folder, tokenizer=True)
    if manifest is not None:
        ours = [*manifest.files, manifest.recipe_name, MANIFEST, REPORT]
    terms = [path.name for path in sorted(folder.iterdir()) if path.name.upper().startswith(_TERMS)]
    ending = f"{Path(weights[0]).suffix}.index.json"
    index = [name for name in holds_weights(folder) if name.endswith(ending)]
    return list(dict.fromkeys([*index, *ours, *terms, "README.md", "config.json"]))


_TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    verify: bool = True,
    quiet: bool = True,
    agree: Callable[[Upload], bool] = lambda upload: True,
    stage: Callable[[str, int], None] = lambda text, nbytes: None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> str | None:
    """Upload the model in ``folder`` to the hub as ``repo_id`` and return its address, None if ``agree`` says no.

    The model is checked first (``verify_model``), unless ``verify`` is False. ``stage`` is told what is done next, and
    the bytes that ``advance`` will be told of while it is: those that are checked, none of those that are sent. All
    files arrive in one commit on the branch ``revision``, which replaces weights of an older model there. In README.md
    the code that loads the model names it as the hub does. Raises CheckpointError for a model that is not sound,
    UsageError for one that is not complete, HubError where the hub can't be used.
    """
    from mergekit.checkpoint import open_checkpoint
    from mergekit.output.staging import is_model_file
    from mergekit.uploads import check_push, push

    folder = Path(folder)
    check_push(repo_id, revision)
    upload = find_upload(folder, repo_id)
    if not agree(upload):
        return None
    if verify:
        stage(f"checking {folder}", open_checkpoint(folder).nbytes())
        found = verify_model(folder, advance=advance)
        if found.faults:
            raise CheckpointError(f"{folder} is not sound, so nothing was sent: {some_of(found.faults, 2)}")
    names = [name for name, _ in upload.files]
    stage(f"sending {len(names)} files to {repo_id}", 0)
    return push(
        folder,
        names,
        repo_id,
        texts=_texts(folder, names, repo_id),
        is_stale=is_model_file,
        private=private,
        revision=revision,
        message=message or f"Upload {folder.resolve().name} with mergekit",
        quiet=quiet,
    )


def _texts(folder: Path, names: list[str], repo_id: str) -> dict[str, str]:
    """The card as it is published, where there is one that is text."""
    from mergekit.output.card_parts import published

    if "README.md" not in names:
        return {}
    try:
        card = (folder / "README.md").read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return {}
    return {"README.md": published(card, repo_id)}
