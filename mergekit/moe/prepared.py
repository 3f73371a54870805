"""Files that a run of a mixture makes before it assembles the output: router rows, merges to be taken apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mergekit.checkpoint import TensorInfo, build_header
from mergekit.dtypes import F32
from mergekit.planning.expression import Read
from mergekit.planning.plan import Source

__all__ = ["PreparedFile", "router_file"]


@dataclass(frozen=True, slots=True)
class PreparedFile:
    """A file of float32 tensors (name, shape) in the staging folder. ``name`` tells it from any other content."""

    name: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    def layout(self) -> tuple[bytes, list[int]]:
        """The file's header, and where each tensor begins."""
        return build_header((name, F32, shape) for name, shape in self.tensors)

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(math.prod(shape) * F32.size for _, shape in self.tensors)

    def source(self, what: str) -> Source:
        """The file as a source of a plan."""
        return Source(f"{what} {self.name}", what, "", (), prepared=True)

    def reads(self, source: int) -> Mapping[str, Read]:
        """A leaf for each tensor, the file being source number ``source``."""
        return {
            name: Read(source, TensorInfo(name, F32, shape, self.name, offset, math.prod(shape) * F32.size))
            for (name, shape), offset in zip(self.tensors, self.layout()[1], strict=True)
        }


def router_file(digest: str, layers: int, experts: int, hidden: int) -> PreparedFile:
    """The file of router rows: tensor ``layer.{i}`` holds the rows [experts, hidden] of layer i."""
    return PreparedFile(
        f"routers-{digest}.safetensors", tuple((f"layer.{i}", (experts, hidden)) for i in range(layers))
    )
