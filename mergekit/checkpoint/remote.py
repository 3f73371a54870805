"""A checkpoint on the hub, known by its headers only: for planning before any weight is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType

from mergekit.checkpoint.checkpoint import Checkpoint, FileIdentity
from mergekit.checkpoint.four_bit import find_packed
from mergekit.checkpoint.header import TensorInfo, header_length, parse_header
from mergekit.checkpoint.index import read_config, read_weight_map
from mergekit.checkpoint.quantized import refuse_quantized
from mergekit.errors import CheckpointError

__all__ = ["open_remote_headers", "remote_header"]


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
        infos, identity = remote_header(label, name, sizes[name], read_range)
        tensors.update(infos)
        identities.append(identity)
    config = read_config(folder)

    def read(found: list[TensorInfo]) -> list[bytes]:
        with ThreadPoolExecutor(8) as pool:  # one short request for each packed tensor
            return list(
                pool.map(lambda i: read_range(i.file, i.offset, i.offset + i.nbytes) if i.nbytes else b"", found)
            )

    packed, tables = find_packed(label, tensors, read)
    refuse_quantized(Path(label), config, {n: i for n, i in tensors.items() if n not in packed and n not in tables})
    return Checkpoint(
        folder,
        MappingProxyType(tensors),
        MappingProxyType(config),
        tuple(identities),
        packed=MappingProxyType(packed),
        tables=tables,
    )


def _bytes(info: TensorInfo, read_range: Callable[[str, int, int], bytes]) -> bytes:
    return read_range(info.file, info.offset, info.offset + info.nbytes) if info.nbytes else b""


def remote_header(
    label: str, name: str, size: int, read_range: Callable[[str, int, int], bytes]
) -> tuple[dict[str, TensorInfo], FileIdentity]:
    """The tensors of the remote file ``name`` of ``size`` bytes, and what identifies it."""
    length = header_length(read_range(name, 0, 8), size, f"{label}/{name}")
    raw = read_range(name, 8, 8 + length)
    infos = parse_header(raw, size, Path(label) / name)
    return infos, FileIdentity(name, size, 0, blake2b(raw, digest_size=8).hexdigest())
