"""Which kind of work computes an output tensor."""

from __future__ import annotations

from typing import Any

from mergekit.execute.copy_work import CastWork, CopyWork, IdenticalWork
from mergekit.execute.elementwise_work import ElementwiseWork
from mergekit.execute.float_work import MergeWork
from mergekit.execute.inputs import Inputs
from mergekit.execute.span_work import SpanWork
from mergekit.execute.sparse_work import SparseWork
from mergekit.execute.work import Job, Sink, Work
from mergekit.methods import Elementwise, Span, Sparse, get_method
from mergekit.planning.expression import Apply, Cast, Identical, inputs_of
from mergekit.planning.plan import OutputTensor, Plan

__all__ = ["make_work", "merge_work", "work_class"]


def make_work(
    output: OutputTensor, plan: Plan, inputs: Inputs, kernels: Any, sink: Sink, block: int | None = None
) -> Work:
    """The work that computes ``output``. ``block`` overrides the number of elements handled at once."""
    expression = output.expression
    job = Job(
        output,
        tuple(inputs.reader(leaf) for leaf in inputs_of(expression)),
        kernels,
        sink,
        block,
        allow_nonfinite=plan.allow_nonfinite,
        seed=plan.seed,
        rounding=plan.rounding,
        statistics=plan.statistics and isinstance(expression, Apply),
    )
    if isinstance(expression, Apply):
        return merge_work(expression, job)
    if isinstance(expression, Identical):
        return IdenticalWork(job, [plan.sources[read.source].short for read in expression.inputs])
    return CastWork(job) if isinstance(expression, Cast) else CopyWork(job)


def merge_work(apply: Apply, job: Job) -> Work:
    """The work of a merge method."""
    return work_class(apply)(apply, job)


def work_class(apply: Apply) -> type[MergeWork]:
    """The kind of work that a method's form takes."""
    form = get_method(apply.method).form
    if apply.svc is not None:
        from mergekit.execute.whole_work import CalibratedWork

        return CalibratedWork
    if isinstance(form, Span):
        return SpanWork
    if isinstance(form, Sparse):
        return SparseWork
    if isinstance(form, Elementwise):
        return ElementwiseWork
    from mergekit.execute.whole_work import WholeWork

    return WholeWork
