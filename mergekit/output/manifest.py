"""merge_manifest.json: what a merge was made of and what it wrote, so that both can be checked later.

Tensors have the cheap checksum that was taken while they were written (``kernels.checksum``): it finds damage, not
forgery. Small files have their SHA-256. README.md is left out, for people edit it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.checkpoint import read_json
from mergekit.errors import CheckpointError
from mergekit.output.record import record_text

if TYPE_CHECKING:
    from mergekit.planning.plan import OutputTensor, Plan, Source

__all__ = [
    "MANIFEST",
    "Manifest",
    "TensorRecord",
    "inputs_of_plan",
    "manifest_of",
    "manifest_text",
    "read_manifest",
    "recipe_text",
    "sha256",
]

MANIFEST = "merge_manifest.json"
_FORMAT = 1
_EDITED = ("README.md",)


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor as it was written; ``checksum`` has 16 hexadecimal digits."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str

    @property
    def place(self) -> tuple[str, str, tuple[int, ...]]:
        """Its file, type and shape: all but what it holds."""
        return self.file, self.dtype, self.shape

    @classmethod
    def of(cls, output: OutputTensor, checksum: int) -> TensorRecord:
        """The record of a planned tensor whose bytes have this checksum."""
        return cls(output.file, output.dtype.code, output.shape, f"{checksum:016x}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a merge_manifest.json.

    ``recipe`` is the SHA-256 of the recipe's file, called ``recipe_name``. ``inputs`` lists the models: short name,
    revision on the hub (or None), and for each weight file its name, size and the digest of its header.
    ``options`` are those of a run that change its result. ``mixture`` is the family of a mixture of experts, or None.
    ``files`` are the small files by name with their SHA-256.
    """

    version: str
    recipe_name: str
    recipe: str
    seed: int
    device: str
    mixture: str | None
    options: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    files: Mapping[str, str]
    tensors: Mapping[str, TensorRecord]


def manifest_text(
    plan: Plan,
    checksums: Mapping[str, int],
    options: Mapping[str, Any],
    documents: Sequence[tuple[str, str | Path]],
) -> str:
    """The file's text. ``checksums`` are those of all tensors, ``documents`` the small files, text or path."""
    tensors = {o.name: TensorRecord.of(o, checksums[o.name]) for o in plan.outputs}
    return record_text({
        "format": _FORMAT,
        "mergekit": plan.version,
        "recipe_name": plan.recipe_name,
        "recipe": sha256(recipe_text(plan)),
        "seed": plan.seed,
        "device": plan.device,
        "mixture": plan.mixture and plan.mixture.family,
        "options": dict(options),
        "inputs": inputs_of_plan(plan),
        "files": {name: sha256(content) for name, content in documents if name not in _EDITED},
        "tensors": {name: [t.file, t.dtype, list(t.shape), t.checksum] for name, t in tensors.items()},
    })  # fmt: skip


def inputs_of_plan(plan: Plan) -> list[dict[str, Any]]:
    """The models of a plan as a manifest lists them."""
    return [
        {
            "model": source.short,
            "revision": _revision(source),
            "files": [[file.name, file.size, file.header] for file in source.files],
        }
        for source in plan.sources
        if not source.prepared
    ]


def recipe_text(plan: Plan) -> str:
    """The recipe as it is written beside the model."""
    return plan.recipe.rstrip() + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a model folder, None if there is none; CheckpointError if it is not one of ours."""
    path = folder / MANIFEST
    return manifest_of(read_json(path), str(path)) if path.is_file() else None


def manifest_of(record: Mapping[str, Any], place: str) -> Manifest:
    """What the JSON of a manifest says; CheckpointError, naming ``place``, if it is not one of ours."""
    if record.get("format") != _FORMAT:
        raise CheckpointError(
            f"{place}: its format is {record.get('format')!r:.40}, this mergekit reads {_FORMAT}; update it"
        )
    try:
        manifest = Manifest(
            version=_is(str, record["mergekit"]),
            recipe_name=_is(str, record["recipe_name"]),
            recipe=_is(str, record["recipe"]),
            seed=_is(int, record["seed"]),
            device=_is(str, record["device"]),
            mixture=None if record["mixture"] is None else _is(str, record["mixture"]),
            options=_is(dict, record["options"]),
            inputs=[_is(dict, entry) for entry in _is(list, record["inputs"])],
            files={name: _is(str, digest) for name, digest in _is(dict, record["files"]).items()},
            tensors={name: _tensor(_is(list, entry)) for name, entry in _is(dict, record["tensors"]).items()},
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{place}: not a manifest of mergekit ({error!s:.80}); make the model again") from None
    for name in [manifest.recipe_name, *manifest.files]:
        if Path(name).name != name or name in (".", "..") or "\\" in name or "\0" in name:
            raise CheckpointError(f"{place}: {name!r:.80} is not the name of a file beside it")
    return manifest


def sha256(content: str | Path) -> str:
    """The SHA-256 of a text (UTF-8) or of a file, in hexadecimal digits."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode("utf-8")).hexdigest()
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:
    """``hashlib.file_digest``, which Python 3.10 lacks."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _revision(source: Source) -> str | None:
    """The commit of a model from the hub: its folder in the cache is named after it."""
    folder = Path(source.folder)
    return folder.name if folder.parent.name == "snapshots" else None


def _tensor(entry: list[Any]) -> TensorRecord:
    file, dtype, shape, checksum = entry
    return TensorRecord(
        _is(str, file), _is(str, dtype), tuple(_is(int, n) for n in _is(list, shape)), _is(str, checksum)
    )


def _is(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{value!r:.60} where {kind.__name__} is expected")
    return value
