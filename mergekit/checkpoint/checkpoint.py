"""A checkpoint on disk: its tensors by name, its config, and what identifies its files. No weight is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mergekit.checkpoint.four_bit import Packed, find_packed
from mergekit.checkpoint.header import TensorInfo, read_header
from mergekit.checkpoint.index import find_weights, read_config
from mergekit.errors import CheckpointError

__all__ = ["Checkpoint", "FileIdentity", "open_checkpoint"]


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one state of a weight file from another: bytes, modification time (ns), digest of its header."""

    name: str
    size: int
    modified: int
    header: str


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The tensors of one model folder, and its config.json.

    ``tensors`` keeps file order, then order of offsets. ``folder`` is where the small files are.
    ``pickled`` tensors have no offsets and are read through ``checkpoint.pickles``. ``packed`` are those stored in 4
    bits, by name; ``tables`` names the tensors that only serve to read them.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    files: tuple[FileIdentity, ...]
    pickled: bool = False
    notices: tuple[str, ...] = field(default=())
    packed: Mapping[str, Packed] = field(default_factory=dict)
    tables: frozenset[str] = field(default=frozenset())

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers and the config of the model in ``folder``.

    ModelNotFoundError if there is no such model, CheckpointError if a file is damaged, hostile or quantised in a
    way that can't be merged.
    """
    from mergekit.checkpoint.quantized import refuse_quantized

    files, weight_map = find_weights(folder)
    config = read_config(folder)
    tensors: dict[str, TensorInfo] = {}
    identities: list[FileIdentity] = []
    notices: list[str] = []
    pickled = not files[0].lower().endswith(".safetensors")
    for file in files:
        path = folder / file
        if pickled:
            from mergekit.checkpoint.pickles import pickle_header

            infos, digest, notice = pickle_header(path)
            notices += [notice] if notice else []
        else:
            infos, digest = read_header(path)
        status = path.stat()
        identities.append(FileIdentity(file, status.st_size, status.st_mtime_ns, digest))
        for name, info in infos.items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor '{name}' is in both {tensors[name].file} and {file}; download the model again"
                )
            if weight_map is not None and weight_map.get(name) != file:
                raise CheckpointError(
                    f"{path}: the index does not list tensor '{name}' for this file; download the model again"
                )
            tensors[name] = info
    if weight_map is not None:
        for name in weight_map:
            if name not in tensors:
                raise CheckpointError(
                    f"{folder}: the index lists tensor {name!r:.200}, but {weight_map[name]} lacks it; "
                    f"download the model again"
                )
    if not tensors:
        raise CheckpointError(f"{folder}: the weight files hold no tensors; download the model again")
    packed, tables = find_packed(folder, tensors, lambda found: [_bytes(folder, info) for info in found])
    refuse_quantized(folder, config, {n: i for n, i in tensors.items() if n not in packed and n not in tables})
    return Checkpoint(
        folder,
        MappingProxyType(tensors),
        MappingProxyType(config),
        tuple(identities),
        pickled,
        tuple(notices),
        MappingProxyType(packed),
        tables,
    )


def _bytes(folder: Path, info: TensorInfo) -> bytes:
    """All bytes of a small tensor."""
    path = folder / info.file
    if info.offset < 0:
        import numpy as np

        from mergekit.checkpoint.pickles import PickledTensor

        buffer = np.empty(info.nbytes, np.uint8)
        PickledTensor(path, info.name).read_into(buffer, 0)
        return buffer.tobytes()
    with path.open("rb") as stream:
        stream.seek(info.offset)
        return stream.read(info.nbytes)
