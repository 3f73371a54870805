"""A checkpoint on the hub, known by its headers only: for planning before any weight is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType

from mergekit.checkpoint.checkpoint import Checkpoint, FileIdentity
from mergekit.checkpoint.header import header_length, parse_header
from mergekit.checkpoint.index import read_json
from mergekit.checkpoint.quantized import refuse_quantized
from mergekit.errors import CheckpointError

__all__ = ["open_remote_headers"]


def open_remote_headers(
    label: str, folder: Path, sizes: dict[str, int], read_range: Callable[[str, int, int], bytes]
) -> Checkpoint:
    """The tensors of a remote model.

    ``folder`` holds its small files; ``sizes`` are the bytes of its safetensors files by name, in order;
    ``read_range(name, start, stop)`` returns bytes of one of them.
    """
    if not sizes:
        raise CheckpointError(f"{label}: no safetensors files, so it can't be planned before download")
    tensors, identities = {}, []
    for name, size in sizes.items():
        length = header_length(read_range(name, 0, 8), size, f"{label}/{name}")
        raw = read_range(name, 8, 8 + length)
        for info in parse_header(raw, size, Path(label) / name).values():
            tensors[info.name] = info
        identities.append(FileIdentity(name, size, 0, blake2b(raw, digest_size=8).hexdigest()))
    config_path = folder / "config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    refuse_quantized(Path(label), config, tensors)
    return Checkpoint(folder, MappingProxyType(tensors), MappingProxyType(config), tuple(identities))
