"""Single tensors of a plan, computed into memory: what forward passes ask for, one at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit.planning.express import Made
from mergekit.planning.plan import Apply, Cast, Identical, OutputTensor, Plan, Split

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit.moe.build import MoePlan

__all__ = ["PlanWeights"]


class PlanWeights:
    """The dense tensors behind a mixture, each computed when it is asked for, in the output's element type.

    What a token meets in the built model is what it meets here: merged attention is merged, adapters are baked.
    """

    def __init__(self, made: MoePlan, threads: int | None = None) -> None:
        self.config: Mapping[str, Any] = made.dense.config
        self._made, self._threads = made, threads

    def tensor(self, name: str) -> Tensor:
        """A shared tensor, or one of the dense MLPs, by its dense name."""
        return _compute(self._made.plan, self._made.shared[name], self._threads)

    def expert(self, expert: int, name: str) -> Tensor:
        """A tensor of an expert's MLPs, by its dense name."""
        return _compute(self._made.plan, self._made.experts[expert][name], self._threads)

    def rows(self, name: str, ids: Sequence[int]) -> Tensor:
        """The rows ``ids`` of a shared tensor, [len(ids), columns]; where possible nothing else of it is read."""
        import torch

        made = self._made.shared[name]
        leaf = made.expression.input if isinstance(made.expression, Cast) else made.expression
        if isinstance(leaf, Apply | Identical):
            return _compute(self._made.plan, made, self._threads)[torch.as_tensor(ids)]
        found: dict[int, Tensor] = {}
        for row in ids:
            if row not in found:
                part = Split(leaf, int(row), 1)
                expression = Cast(part) if isinstance(made.expression, Cast) else part
                one = dataclasses.replace(made, shape=(1, *made.shape[1:]), expression=expression)
                found[row] = _compute(self._made.plan, one, 1)[0]
        return torch.stack([found[row] for row in ids])


class _Memory:
    """A sink that keeps one tensor in memory."""

    def __init__(self, nbytes: int) -> None:
        self.data = np.empty(nbytes, np.uint8)

    def write(self, output: OutputTensor, start: int, data: np.ndarray) -> None:
        """Keep ``data``."""
        self.data[start : start + len(data)] = data

    def finish(self, output: OutputTensor, checksum: int) -> None:
        """Nothing to record."""

    def note(self, text: str) -> None:
        """The run that writes the tensor says it."""


def _compute(plan: Plan, made: Made, threads: int | None) -> Tensor:
    import torch

    from mergekit.execute import run_threads

    nbytes = math.prod(made.shape) * made.dtype.size
    output = OutputTensor(made.name, made.shape, made.dtype, "", 0, nbytes, made.expression)
    sink = _Memory(nbytes)
    run_threads(dataclasses.replace(plan, allow_nonfinite=True), sink, outputs=[output], threads=threads)
    return torch.from_numpy(sink.data).view(getattr(torch, made.dtype.name)).reshape(made.shape)
