"""The work of the ``elementwise`` form: selection, sums over the tensor, then the function, chunk by chunk."""

from __future__ import annotations

from mergekit.execute.float_work import MergeWork
from mergekit.execute.work import Job
from mergekit.planning.plan import Apply

__all__ = ["ElementwiseWork"]


class ElementwiseWork(MergeWork):
    """A function of chunks."""

    def __init__(self, apply: Apply, job: Job) -> None:
        super().__init__(apply, job)
