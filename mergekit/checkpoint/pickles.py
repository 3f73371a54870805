"""Pickled checkpoints (``pytorch_model.bin``), opened by torch's restricted reader only."""

from __future__ import annotations

import zipfile
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from mergekit.checkpoint.header import TensorInfo
from mergekit.dtypes import BY_CODE, DType
from mergekit.errors import CheckpointError

__all__ = ["PickledTensor", "pickle_header"]


@lru_cache(maxsize=64)
def _load(path: Path) -> tuple[dict[str, Any], bool]:
    """The tensors of a pickled shard, memory-mapped where the format allows, and whether that was so."""
    import torch

    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler raises many types; each means that the file can't be trusted
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: refused by torch's safe reader ({first[:160]}); use the model's safetensors version"
        ) from None
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: tensor '{name}' is {tensor.layout}, not a plain array")
    return tensors, mapped


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

        tensor = _load(path)[0][name].detach().contiguous()
        self._bytes: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()

    def read_into(self, buffer: np.ndarray, start: int) -> None:
        """Fill ``buffer`` (uint8) with the bytes from ``start``."""
        np.copyto(buffer, self._bytes[start : start + len(buffer)])
