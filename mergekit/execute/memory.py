"""How much memory the buffers of a run take."""

from __future__ import annotations

from mergekit.execute.work import BLOCK_BYTES, MOST_RANGES, split
from mergekit.methods import get_method
from mergekit.methods.rules import TopMagnitude
from mergekit.methods.spec import Sparse
from mergekit.planning.plan import Apply, Plan

__all__ = ["buffer_bytes"]

_FINE_BYTES = 4 << 16
_COARSE_BYTES = 8 << 15


def buffer_bytes(plan: Plan, threads: int) -> int:
    """An upper bound on the bytes of blocks and histograms that ``threads`` workers hold at once."""
    most = 0
    for output in plan.outputs:
        expression = output.expression
        if isinstance(expression, Apply) and isinstance(get_method(expression.method).form, Sparse):
            merge = get_method(expression.method).function(**dict(expression.parameters))
            if any(isinstance(keep, TopMagnitude) and 0 < keep.density < 1 for keep in merge.keep):
                ranges = len(split(output.nbytes // output.dtype.size))
                most = max(most, len(expression.inputs) * (ranges * _FINE_BYTES + (threads + 1) * _COARSE_BYTES))
    assert most <= (MOST_RANGES + threads + 1) * _FINE_BYTES * max(1, len(plan.sources))
    # One tensor is computed while the next one is opened.
    return threads * 2 * BLOCK_BYTES + 2 * most
