"""Pickled checkpoints (``pytorch_model.bin``), opened by torch's restricted reader only."""

from __future__ import annotations

import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from mergekit.checkpoint.header import TensorInfo
from mergekit.checkpoint.pickle_bombs import is_bomb
from mergekit.dtypes import BY_CODE, DType
from mergekit.errors import CONTROL, CheckpointError

__all__ = ["PickledTensor", "pickle_header"]

_GLOBAL = re.compile(r"GLOBAL (\S+)")
_OLD_PICKLES = 5
"""An old file has a magic number, a version, the machine, the tensors and the names of their storages, each pickled."""


def _load(path: Path) -> tuple[dict[str, Any], bool]:
    """The tensors of a pickled shard, memory-mapped where the format allows, and whether that was so."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    return _load_state(path, (status.st_size, status.st_mtime_ns, status.st_ino))


@lru_cache(maxsize=64)
def _load_state(path: Path, state: tuple[int, ...]) -> tuple[dict[str, Any], bool]:
    """``_load`` of the file as it is now: a file that changes is another one."""
    import torch

    mapped = _is_archive(path)
    try:
        if _has_bomb(path, mapped):
            raise CheckpointError(
                f"{path}: its objects contain each other so often that no memory holds them; the file is damaged or "
                f"hostile"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickles of other versions: a fault is raised anyway
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except Exception as error:  # archives and the unpickler raise many types: it can't be trusted
        raise CheckpointError(f"{path}: {_reason(path, str(error))}") from None
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    for name, value in content.items():
        if isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
            raise CheckpointError(f"{path}: tensors are nested under '{name!s:.80}'; save one flat state_dict instead")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or CONTROL.search(name):
            raise CheckpointError(f"{path}: {name!r:.200} is not the name of a tensor; the file is damaged or hostile")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device.type}"
            raise CheckpointError(f"{path}: tensor '{name}' is {kind}, not a plain array; save the plain weights")
    _check_storages(path, tensors.values())
    return tensors, mapped


def _has_bomb(path: Path, is_archive: bool) -> bool:
    """Whether one of the pickles in a file is a bomb: that of an archive, or the first few of an old file."""
    if not is_archive:
        with path.open("rb") as stream:
            return any(is_bomb(stream) for _ in range(_OLD_PICKLES))
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".pkl"):
                with archive.open(name) as record:
                    if is_bomb(record):
                        return True
    return False


def _is_archive(path: Path) -> bool:
    """Whether a pickle has its tensors beside it in a zip archive, from which they can be mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (UnicodeDecodeError, NotImplementedError, OverflowError, MemoryError):  # the last for sizes that it claims
        raise CheckpointError(f"{path}: a damaged or hostile archive; download it again") from None
    except zipfile.BadZipFile:
        if _is_tar(path):  # before 2.6, torch's safe reader could be made to run code by these
            raise CheckpointError(f"{path}: a tar archive of 2017 or earlier; use the safetensors version") from None
        return False
    if packed:
        raise CheckpointError(
            f"{path}: a compressed archive, which torch never writes; unpack it, or download it again"
        )
    return True


def _is_tar(path: Path) -> bool:
    """Whether torch would take a file for a tar archive. (``tarfile.is_tarfile`` unpacks others, in any memory.)"""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return False
    except (ValueError, OverflowError, MemoryError):  # a header that claims nonsense: a tar all the same
        return True
    return True


def _check_storages(path: Path, tensors: Iterable[Any]) -> None:
    """Refuse storages that reach into each other: a record of the archive is shorter than the pickle claims."""
    storages = {(s.data_ptr(), s.nbytes()) for s in (tensor.untyped_storage() for tensor in tensors) if s.nbytes()}
    end = 0
    for start, nbytes in sorted(storages):
        if start < end:
            raise CheckpointError(f"{path}: its tensors overlap; the file is damaged or hostile, download it again")
        end = start + nbytes


def _reason(path: Path, text: str) -> str:
    """Why torch's safe reader refused a file, in one line."""
    with path.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version "):
        return "this is a git-lfs pointer, not the weights; run `git lfs pull`"
    if start.lstrip()[:1] in (b"<", b"{"):
        return "this is a web page or a server's answer, not the weights; download it again"
    name = _GLOBAL.search(text)
    if name:
        return f"this pickle asks for '{name[1]:.80}', which could run code: refused; use the safetensors version"
    return "the file is damaged, or not a pickle of tensors; download it again, or use the safetensors version"


def _dtype(tensor: Any, name: str, path: Path) -> DType:
    text = str(tensor.dtype).removeprefix("torch.")
    for dtype in BY_CODE.values():
        if dtype.name == text:
            return dtype
    raise CheckpointError(f"{path}: tensor '{name}' has the dtype {text}, which can't be merged")


def pickle_header(path: Path) -> tuple[dict[str, TensorInfo], str, str | None]:
    """The tensors of a pickled shard, a digest of their descriptions, and a notice if it had to be read whole."""
    tensors, mapped = _load(path)
    infos = {}
    for name, tensor in tensors.items():
        dtype = _dtype(tensor, name, path)
        infos[name] = TensorInfo(name, dtype, tuple(tensor.shape), path.name, -1, tensor.numel() * dtype.size)
    digest = blake2b(repr([(i.name, i.dtype.code, i.shape) for i in infos.values()]).encode(), digest_size=8)
    notice = None
    if not mapped:
        notice = f"{path.name} is an old pickle without a table of contents: it is read whole into memory"
    return infos, digest.hexdigest(), notice


class PickledTensor:
    """The bytes of one tensor of a pickled shard, read by position."""

    def __init__(self, path: Path, name: str) -> None:
        import torch

        tensor = _load(path)[0][name].detach().resolve_neg().contiguous()
        self._bytes: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()

    def read_into(self, buffer: np.ndarray, start: int) -> None:
        """Fill ``buffer`` (uint8) with the bytes from ``start``."""
        np.copyto(buffer, self._bytes[start : start + len(buffer)])
