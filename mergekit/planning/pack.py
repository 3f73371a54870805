"""Pack output tensors into shards: names, headers and offsets are settled before a byte is computed."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mergekit.checkpoint import build_header
from mergekit.planning.express import Made
from mergekit.planning.plan import OutputTensor, Shard

__all__ = ["pack"]


def pack(made: Sequence[Made], shard_size: int) -> tuple[tuple[OutputTensor, ...], tuple[Shard, ...], str | None]:
    """The tensors with their files and offsets, the shards, and the index as JSON text (None for a single file).

    A shard is closed before a tensor that would make its data exceed ``shard_size`` bytes (0: one shard).
    """
    groups: list[list[Made]] = [[]]
    filled = 0
    for tensor in made:
        nbytes = tensor.nbytes(tensor.dtype)
        if groups[-1] and shard_size > 0 and filled + nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += nbytes
    outputs: list[OutputTensor] = []
    shards: list[Shard] = []
    for number, group in enumerate(groups, 1):
        single = len(groups) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, offsets = build_header((t.name, t.dtype, t.shape) for t in group)
        size = len(header)
        for tensor, offset in zip(group, offsets, strict=True):
            nbytes = tensor.nbytes(tensor.dtype)
            outputs.append(
                OutputTensor(tensor.name, tensor.shape, tensor.dtype, file, offset, nbytes, tensor.expression)
            )
            size = offset + nbytes
        shards.append(Shard(file, header, size))
    return tuple(outputs), tuple(shards), _index(outputs) if len(shards) > 1 else None


def _index(outputs: Sequence[OutputTensor]) -> str:
    metadata = {
        "total_size": sum(o.nbytes for o in outputs),
        "total_parameters": sum(o.nbytes // o.dtype.size for o in outputs),
    }
    return json.dumps({"metadata": metadata, "weight_map": {o.name: o.file for o in outputs}}, indent=2) + "\n"
