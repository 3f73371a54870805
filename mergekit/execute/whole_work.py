"""The work of the ``whole`` form: tensors read whole, and any function of them."""

from __future__ import annotations

from mergekit.execute.float_work import MergeWork
from mergekit.execute.work import Job
from mergekit.planning.plan import Apply

__all__ = ["WholeWork"]


class WholeWork(MergeWork):
    """A function of whole tensors."""

    def __init__(self, apply: Apply, job: Job) -> None:
        super().__init__(apply, job)
