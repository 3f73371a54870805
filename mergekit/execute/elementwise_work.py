"""The work of the ``elementwise`` form: selection and sums over the tensor where wanted, then the function, by chunks."""

from __future__ import annotations

from mergekit.execute.float_work import FloatWork
from mergekit.execute.work import Job
from mergekit.planning.plan import Apply

__all__ = ["ElementwiseWork"]


class ElementwiseWork(FloatWork):
    """A function of chunks."""

    def __init__(self, apply: Apply, job: Job) -> None:
        super().__init__(job)
