"""A checkpoint on the hub, known by its headers only: for planning before any weight is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType

from mergekit.checkpoint.checkpoint import Checkpoint, FileIdentity
from mergekit.checkpoint.header import header_length, parse_header
from mergekit.checkpoint.index import read_config, read_weight_map
from mergekit.checkpoint.quantized import refuse_quantized
from mergekit.errors import CheckpointError

__all__ = ["open_remote_headers"]


def open_remote_headers(
    label: str, folder: Path, sizes: dict[str, int], read_range: Callable[[str, int, int], bytes]
) -> Checkpoint:
    """The tensors of a remote model.

    ``folder`` holds its small files; ``sizes`` are the bytes of its files by name; ``read_range(name, start, stop)``
    returns bytes of one of them.
    """
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_weight_map(index).values())) if index.is_file() else ["model.safetensors"]
    if not sizes.keys() >= set(names):
        raise CheckpointError(
            f"{label}: {next(n for n in names if n not in sizes)} is missing, or goes by another name"
        )
    tensors, identities = {}, []
    for name in names:
        size = sizes[name]
        length = header_length(read_range(name, 0, 8), size, f"{label}/{name}")
        raw = read_range(name, 8, 8 + length)
        for info in parse_header(raw, size, Path(label) / name).values():
            tensors[info.name] = info
        identities.append(FileIdentity(name, size, 0, blake2b(raw, digest_size=8).hexdigest()))
    config = read_config(folder)
    refuse_quantized(Path(label), config, tensors)
    return Checkpoint(folder, MappingProxyType(tensors), MappingProxyType(config), tuple(identities))
