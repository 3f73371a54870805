"""Lengths of whole models and of their differences from the base: what automatic weights are made of."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from mergekit.errors import NonFiniteError
from mergekit.execute.inputs import Inputs
from mergekit.execute.work import ALIGNMENT, BLOCK_BYTES
from mergekit.planning.expression import Apply
from mergekit.planning.plan import OutputTensor, Plan

__all__ = ["is_weighted", "model_factors", "with_weights"]


def is_weighted(plan: Plan) -> bool:
    """Whether some weights of the plan are still to be made."""
    return any(isinstance(o.expression, Apply) and o.expression.weighting != "none" for o in plan.outputs)


def model_factors(plan: Plan, kernels: Any, threads: int) -> dict[str, dict[int, float]]:
    """The factor on each model's weight, by kind of weighting and the model's position in the recipe.

    Lengths are those of all merged tensors together. ``metagpt``: the squared length of the model's task vector over
    the sum of all of them (Zhou et al. 2024, arXiv 2406.11385, closed form for lambda). ``nan``: one over the length
    of the model's weights, over the sum of those (Si et al. 2025, arXiv 2505.16148). A model without any length
    counts as nothing; if none has any, all count the same.
    """
    outputs = [o for o in plan.outputs if isinstance(o.expression, Apply) and o.expression.weighting != "none"]
    squares: dict[int, np.ndarray] = {}
    with Inputs(plan.sources) as inputs, ThreadPoolExecutor(threads) as pool:
        # In order of the tensors: sums of floats depend on it.
        for output, sums in zip(outputs, pool.map(lambda o: _squares(o, inputs, kernels), outputs), strict=True):
            assert isinstance(output.expression, Apply)
            if not np.isfinite(sums).all():
                raise NonFiniteError(
                    f"tensor {output.name} of some model holds NaN or infinity, so '{output.expression.weighting}' has "
                    f"no lengths to make weights from; mend the model, or give weights"
                )
            for model, pair in zip(output.expression.models[1:], sums, strict=True):
                squares[model] = squares.get(model, np.zeros(2)) + pair
    weights, deltas = ({model: float(pair[i]) for model, pair in squares.items()} for i in (0, 1))
    return {
        "nan": _shares({model: 1 / square**0.5 if square > 0 else 0.0 for model, square in weights.items()}),
        "metagpt": _shares(deltas),
    }


def _squares(output: OutputTensor, inputs: Inputs, kernels: Any) -> np.ndarray:
    """Squared lengths of each model's tensor and of its delta: float64 [models without the base, 2]."""
    assert isinstance(output.expression, Apply)
    readers = [inputs.reader(leaf) for leaf in output.expression.inputs]
    codes = np.array([kernels.CODES[reader.dtype] for reader in readers], np.int64)
    size = output.nbytes // output.dtype.size
    block = max(ALIGNMENT, BLOCK_BYTES // sum(r.dtype.size for r in readers) // ALIGNMENT * ALIGNMENT)
    rows = np.empty((len(readers), block * max(r.dtype.size for r in readers)), np.uint8)
    squares = np.zeros((len(readers) - 1, 2))
    for at in range(0, size, block):
        count = min(block, size - at)
        for reader, row in zip(readers, rows, strict=True):
            reader.read(at, count, row)
        for m in range(1, len(readers)):
            # The base and one model at a time: products of different models are of no use here.
            pair, types = rows[[0, m]], codes[[0, m]]
            for i, base in enumerate((-1, 0)):
                sums = np.zeros((2, 2))
                kernels.gram(pair, types, base, count, sums)
                squares[m - 1, i] += sums[1, 1]
    return squares


def _shares(parts: dict[int, float]) -> dict[int, float]:
    """Each part over the sum of all; equal shares if the sum is nothing."""
    total = sum(parts.values())
    return {model: part / total if total > 0 else 1 / len(parts) for model, part in parts.items()}


def with_weights(plan: Plan, factors: dict[str, dict[int, float]]) -> Plan:
    """The same plan, its ``weight`` parameters multiplied by ``factors`` where a weighting is asked for."""

    def weighted(output: OutputTensor) -> OutputTensor:
        apply = output.expression
        if not isinstance(apply, Apply) or apply.weighting == "none":
            return output
        values = dict(apply.parameters)
        models = apply.models[1:] if apply.has_base else apply.models
        found = factors[apply.weighting]
        values["weight"] = tuple(w * found[model] for w, model in zip(values["weight"], models, strict=True))
        return replace(output, expression=replace(apply, parameters=tuple(sorted(values.items())), weighting="none"))

    return replace(plan, outputs=tuple(map(weighted, plan.outputs)))
