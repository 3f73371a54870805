"""How much memory the buffers of a run take, and which kernels it calls."""

from __future__ import annotations

from mergekit.execute.adapted import held_bytes
from mergekit.execute.merge_work import work_class
from mergekit.execute.norms import is_weighted
from mergekit.execute.work import BLOCK_BYTES
from mergekit.planning.expression import Apply, Bake, Dequantize4, Leaf, Quantize4, Read, Rows, inputs_of
from mergekit.planning.plan import OutputTensor, Plan

__all__ = ["buffer_bytes", "forms"]


def buffer_bytes(plan: Plan, threads: int) -> int:
    """An upper bound on the bytes that ``threads`` workers hold at once: blocks, histograms, whole tensors."""
    most = max((_held(output, threads) for output in plan.outputs), default=0)
    # One tensor is computed while the next one is opened. Lengths of models are taken tensor by tensor, before.
    blocks = 2 + 2 * is_weighted(plan)
    return threads * blocks * BLOCK_BYTES + min(threads, 2) * most


def _held(output: OutputTensor, threads: int) -> int:
    expression = output.expression
    own = work_class(expression).held(expression, output.shape, threads) if isinstance(expression, Apply) else 0
    return own + sum(held_bytes(leaf) for leaf in inputs_of(expression))


def forms(plan: Plan) -> list[str]:
    """The families of kernels that a plan needs, as ``kernels.warmup`` names them."""
    found = {"span": True}
    for output in plan.outputs:
        expression = output.expression
        if isinstance(expression, Apply):
            found.update(dict.fromkeys(work_class(expression).compiled(expression), True))
        if any(_is_adapted(leaf) for leaf in inputs_of(expression)):
            found["adapters"] = True
    return list(found)


def _is_adapted(leaf: Leaf) -> bool:
    if isinstance(leaf, Rows):
        return any(_is_adapted(part) for part in leaf.inputs)
    while not isinstance(leaf, Read | Bake | Quantize4 | Dequantize4):
        assert not isinstance(leaf, Rows), "rows are gathered last"
        leaf = leaf.input
    return not isinstance(leaf, Read)
