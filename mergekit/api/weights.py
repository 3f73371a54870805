"""Single tensors of a plan, computed into memory: what forward passes ask for, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit.planning.express import Made
from mergekit.planning.expression import Apply, Cast, Identical, Split
from mergekit.planning.plan import OutputTensor, Plan

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
        return _compute(self._made.plan, [self._made.shared[name]], self._threads)[0]

    def expert(self, expert: int, name: str) -> Tensor:
        """A tensor of an expert's MLPs, by its dense name."""
        return _compute(self._made.plan, [self._made.experts[expert][name]], self._threads)[0]

    def rows(self, name: str, ids: Sequence[int]) -> Tensor:
        """The rows ``ids`` of a shared tensor, [len(ids), columns]; where possible nothing else of it is read."""
        import torch

        made = self._made.shared[name]
        leaf = made.expression.input if isinstance(made.expression, Cast) else made.expression
        if isinstance(leaf, Apply | Identical):
            return _compute(self._made.plan, [made], self._threads)[0][torch.as_tensor(ids)]
        distinct = list(dict.fromkeys(int(row) for row in ids))
        parts = [Split(leaf, row, 1) for row in distinct]
        row = dataclasses.replace(made, shape=(1, *made.shape[1:]))
        wanted = [
            dataclasses.replace(row, name=str(n), expression=Cast(p) if isinstance(made.expression, Cast) else p)
            for n, p in zip(distinct, parts, strict=True)
        ]
        found = dict(zip(distinct, _compute(self._made.plan, wanted, self._threads), strict=True))
        return torch.cat([found[int(row)] for row in ids])


class _Memory:
    """A sink that keeps tensors in memory, by name."""

    def __init__(self, outputs: Sequence[OutputTensor]) -> None:
        self.data = {output.name: np.empty(output.nbytes, np.uint8) for output in outputs}

    def write(self, output: OutputTensor, start: int, data: np.ndarray) -> None:
        """Keep ``data``."""
        self.data[output.name][start : start + len(data)] = data

    def finish(self, output: OutputTensor, checksum: int, figures: Mapping[str, Any] | None) -> None:
        """Nothing to record."""

    def note(self, tensor: str, text: str) -> None:
        """The run that writes the tensor says it."""


def _compute(plan: Plan, made: Sequence[Made], threads: int | None) -> list[Tensor]:
    import torch

    from mergekit.execute import run_threads

    outputs = [OutputTensor(m.name, m.shape, m.dtype, "", 0, m.nbytes(m.dtype), m.expression) for m in made]
    sink = _Memory(outputs)
    plan = dataclasses.replace(plan, allow_nonfinite=True, statistics=False)
    run_threads(plan, sink, outputs=outputs, threads=threads)
    return [torch.from_numpy(sink.data[m.name]).view(getattr(torch, m.dtype.name)).reshape(m.shape) for m in made]
