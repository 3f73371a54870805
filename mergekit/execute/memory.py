"""How much memory the buffers of a run take, and which kernels it calls."""

from __future__ import annotations

from mergekit.execute.adapted import held_bytes
from mergekit.execute.work import BLOCK_BYTES, MOST_RANGES, split
from mergekit.methods import get_method
from mergekit.methods.rules import TopMagnitude
from mergekit.methods.spec import Sparse
from mergekit.planning.plan import (
    Apply,
    Bake,
    Cast,
    Dequantize4,
    Expression,
    Identical,
    Leaf,
    Plan,
    Quantize4,
    Read,
)

__all__ = ["buffer_bytes", "forms"]

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
    held = max((_held(output.expression) for output in plan.outputs), default=0)
    # One tensor is computed while the next one is opened.
    return threads * 2 * BLOCK_BYTES + 2 * (most + held)


def forms(plan: Plan) -> list[str]:
    """The families of kernels that a plan needs, as ``kernels.warmup`` names them."""
    found = ["span"]
    if isinstance(get_method(plan.method).form, Sparse):
        found.append("sparse")
    if any(_is_adapted(leaf) for output in plan.outputs for leaf in _inputs(output.expression)):
        found.append("adapters")
    return found


def _inputs(expression: Expression) -> tuple[Leaf, ...]:
    if isinstance(expression, Apply | Identical):
        return expression.inputs
    return (expression.input if isinstance(expression, Cast) else expression,)


def _held(expression: Expression) -> int:
    return sum(held_bytes(leaf) for leaf in _inputs(expression))


def _is_adapted(leaf: Leaf) -> bool:
    while not isinstance(leaf, Read | Bake | Quantize4 | Dequantize4):
        leaf = leaf.input
    return not isinstance(leaf, Read)
