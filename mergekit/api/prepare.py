"""Make what a mixture's plan reads besides its models: files in the staging folder, each written once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit.api.options import RunOptions
from mergekit.api.run import Hooks
from mergekit.checkpoint.positional import write_at
from mergekit.dtypes import F32
from mergekit.planning.plan import OutputTensor

if TYPE_CHECKING:
    from mergekit.moe.build import MoePlan

__all__ = ["read_routers", "write_merged", "write_routers"]


def write_routers(made: MoePlan, staging: Path, rows: Callable[[], np.ndarray]) -> None:
    """Put the file of router rows into the staging folder, unless it is there; ``rows`` makes float32 [L, E, H]."""
    path = staging / made.routers.name
    if path.is_file():
        return
    values = np.ascontiguousarray(rows(), "<f4")
    assert values.shape == made.router_shape
    partial = path.with_suffix(".part")
    with partial.open("wb") as stream:
        stream.write(made.routers.layout()[0])
        stream.write(values.tobytes())
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def read_routers(made: MoePlan, staging: Path) -> np.ndarray:
    """The router rows of the file in the staging folder, float32 [layers, experts, hidden]."""
    raw = (staging / made.routers.name).read_bytes()[len(made.routers.layout()[0]) :]
    return np.frombuffer(raw, "<f4").reshape(made.router_shape)


class _File:
    """A sink for float32 tensors at their places in one file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, output: OutputTensor, start: int, data: np.ndarray) -> None:
        """Write ``data`` at byte ``start`` of a tensor."""
        view, place = data.data, output.offset + start
        while view:
            written = write_at(self._descriptor, view, place)
            view, place = view[written:], place + written

    def finish(self, output: OutputTensor, checksum: int, figures: Mapping[str, Any] | None) -> None:
        """Nothing to record: an unfinished file is written again."""

    def note(self, tensor: str, text: str) -> None:
        """Said again when the output's tensors are made of these."""


def write_merged(made: MoePlan, staging: Path, options: RunOptions, hooks: Hooks) -> None:
    """Merge the matrices that the output takes apart, whole, in float32; nothing to do if that file is there."""
    from mergekit.execute import run_threads

    path = staging / made.merged.name
    if not made.merged.tensors or path.is_file():
        hooks.advance(made.merged.nbytes)
        return
    hooks.stage(f"merging {len(made.merged.tensors):,} matrices whole, before the experts take them apart")
    header, offsets = made.merged.layout()
    outputs = [
        OutputTensor(name, shape, F32, path.name, offset, made.shared[name].nbytes(F32), made.shared[name].expression)
        for (name, shape), offset in zip(made.merged.tensors, offsets, strict=True)
    ]
    partial = path.with_suffix(".part")
    with partial.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + made.merged.nbytes)
        stream.flush()
        plan = dataclasses.replace(made.plan, statistics=False)
        sink = _File(stream.fileno())
        told: Any = {"advance": hooks.advance, "opened": hooks.opened}
        run_threads(plan, sink, outputs=outputs, threads=options.threads, **told)
        os.fsync(stream.fileno())
    partial.replace(path)
