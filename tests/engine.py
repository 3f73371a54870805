"""Any method on arrays, by the engine's own work: what a merge of files computes, without files."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from kernel_cases import ArrayReader, ArraySink
from mergekit.dtypes import F32, DType
from mergekit.execute.buffers import Buffers
from mergekit.execute.merge_work import merge_work
from mergekit.execute.work import Job
from mergekit.kernels import cpu
from mergekit.methods import Method, get_method
from mergekit.methods.spec import REQUIRED
from mergekit.planning.expression import Apply
from mergekit.planning.plan import OutputTensor
from models import decode

__all__ = ["arguments", "merge"]


def arguments(method: Method, inputs: int, has_base: bool, **given: Any) -> dict[str, Any]:
    """The keyword arguments of a method's function: ``given`` (one value for all models, or a tuple) or defaults."""
    found = {}
    for parameter in method.params:
        if not parameter.used:
            continue
        value = given.get(parameter.name, parameter.default)
        assert value is not REQUIRED, f"{method.name} needs {parameter.name}"
        if parameter.scope != "once" and not isinstance(value, tuple):
            value = (value,) * (inputs - (has_base and parameter.scope == "each"))
        found[parameter.argument] = value
    return found


def merge(
    name: str,
    inputs: Sequence[np.ndarray],
    *,
    has_base: bool | None = None,
    dtype: DType = F32,
    out: DType | None = None,
    kernels: Any = cpu,
    block: int | None = None,
    seed: int = 0,
    tensor: str = "t",
    scale: float = 1.0,
    models: tuple[int, ...] | None = None,
    **parameters: Any,
) -> np.ndarray:
    """The result of a method on ``inputs`` (the base first), stored as ``dtype``, in float64.

    ``models``: their positions in the recipe, which key random masks.
    """
    method, shape, out = get_method(name), inputs[0].shape, out or dtype
    has_base = method.base == "required" if has_base is None else has_base
    values = arguments(method, len(inputs), has_base, **parameters)
    if method.check and set(inspect.signature(method.check).parameters):
        method.check(**values)
    positions = models or tuple(range(len(inputs)))
    apply = Apply(name, (), positions, has_base, tuple(sorted(values.items())), scale=scale)
    size = inputs[0].size
    output = OutputTensor(tensor, shape, out, "model.safetensors", 0, size * out.size, apply)
    sink = ArraySink(output.nbytes)
    readers = tuple(ArrayReader(np.asarray(x).reshape(-1), dtype) for x in inputs)
    work = merge_work(apply, Job(output, readers, kernels, sink, block, seed=seed))
    buffers = Buffers()
    for phase in range(work.phases):
        for index in reversed(range(len(work.ranges))):
            work.run(phase, index, buffers)
        work.reduce(phase)
    return decode(sink.data.tobytes(), out, shape)
