"""Raw buffers for the kernels and the two back ends that take them; a merge of such buffers without any file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mergekit.dtypes import BF16, F16, F32, F64, DType
from mergekit.execute.buffers import Buffers
from mergekit.execute.merge_work import merge_work
from mergekit.execute.work import Job
from mergekit.kernels import cpu
from mergekit.kernels.accelerator import TorchKernels
from mergekit.methods import get_method
from mergekit.planning.expression import Apply
from mergekit.planning.plan import OutputTensor
from models import decode, encode

FLOATS = (BF16, F16, F32, F64)

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
    ],
)
TORCH_DEVICES = ["cpu", CUDA]
BACK_ENDS = ["numba", "torch", CUDA]


def back_end(name: str) -> Any:
    """``numba``, ``torch`` (on the processor), or torch on the device called ``name``."""
    return cpu if name == "numba" else TorchKernels("cpu" if name == "torch" else name)


def pack(models: Sequence[np.ndarray], dtypes: Sequence[DType]) -> tuple[np.ndarray, np.ndarray]:
    """``raw`` and ``codes`` as kernels take them. What follows the elements is NaN in every type."""
    size = len(models[0])
    raw = np.full((len(models), (-(-size // 64) + 1) * 512), 0xFF, np.uint8)
    for row, values, dtype in zip(raw, models, dtypes, strict=True):
        row[: size * dtype.size] = np.frombuffer(encode(values, dtype), np.uint8)
    return raw, np.array([cpu.CODES[dtype] for dtype in dtypes], np.int64)


def unpack(raw: np.ndarray, dtype: DType, size: int) -> np.ndarray:
    """The exact values of a row or an output, as float64."""
    return decode(raw[: size * dtype.size].tobytes(), dtype, (size,))


def stored32(values: np.ndarray, dtype: DType) -> np.ndarray:
    """``values`` as a kernel sees them once stored as ``dtype``: float32."""
    return decode(encode(values, dtype), dtype, values.shape).astype(np.float32)


def models_of(kind: str, count: int, size: int, seed: int = 0) -> list[np.ndarray]:
    """A base and fine-tunes of it, float32 values.

    ``plain``: random numbers. ``exact``: dyadic fractions, whose weighted sums float32 holds exactly; many deltas are
    zero and many are equal. ``equal``: every delta is the same. ``same``: every model is the base.
    ``tiny``: deltas that are subnormal float32 numbers.
    """
    random = np.random.default_rng([seed, size])
    base = random.standard_normal(size)
    if kind == "plain":
        return [
            base.astype(np.float32),
            *(np.float32(base + 0.2 * random.standard_normal(size)) for _ in range(count - 1)),
        ]
    if kind == "tiny":
        return [np.zeros(size, np.float32)] + [
            (random.integers(-50, 51, size).astype(np.int32) & 0x7FFFFFFF & 0xFF).view(np.float32)
            for _ in range(count - 1)
        ]
    base = np.round(base * 4) / 16
    if kind == "exact":
        return [np.float32(base + random.integers(-6, 7, size) / 64 * (m > 0)) for m in range(count)]
    return [np.float32(base + (m / 64 if kind == "equal" else 0)) for m in range(count)]


class ArrayReader:
    """Gives the elements of an array."""

    offset = -1  # not in a file

    def __init__(self, values: np.ndarray, dtype: DType) -> None:
        self.dtype = dtype
        self._raw = np.frombuffer(encode(values, dtype), np.uint8)

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        row[: count * self.dtype.size] = self._raw[start * self.dtype.size : (start + count) * self.dtype.size]


class ArraySink:
    """Keeps one tensor."""

    def __init__(self, nbytes: int) -> None:
        self.data = np.full(nbytes, 0xFF, np.uint8)
        self.notes: list[str] = []

    def write(self, output: OutputTensor, start: int, data: np.ndarray) -> None:
        self.data[start : start + len(data)] = data

    def finish(self, output: OutputTensor, checksum: int, figures: object) -> None:
        assert checksum == cpu.checksum(self.data, 0)

    def note(self, tensor: str, text: str) -> None:
        self.notes.append(f"{tensor} {text}")


def merge_sparse(
    kernels: Any,
    method: str,
    models: Sequence[np.ndarray],
    *,
    dtypes: Sequence[DType] | None = None,
    out: DType = F32,
    block: int | None = None,
    seed: int = 5,
    shape: tuple[int, ...] | None = None,
    **parameters: Any,
) -> np.ndarray:
    """The result of a sparse method on arrays (the first is the base), by the engine's own work, as float64 [size].

    ``shape`` is the tensor's, if not that of a vector.
    """
    size, count = models[0].size, len(models) - 1
    ones = (1.0,) * count
    values: dict[str, Any] = {"weight": ones, "density": ones, "normalize": False, "rescale": "none", "lambda_": 1.0}
    values = {p.argument: values[p.argument] for p in get_method(method).params if p.argument in values} | parameters
    apply = Apply(method, (), tuple(range(count + 1)), True, tuple(values.items()))
    output = OutputTensor("t", (size,) if shape is None else shape, out, "model.safetensors", 0, size * out.size, apply)
    readers = [ArrayReader(m, d) for m, d in zip(models, dtypes or [F32] * (count + 1), strict=True)]
    sink = ArraySink(output.nbytes)
    work = merge_work(apply, Job(output, tuple(readers), kernels, sink, block, seed=seed))
    buffers = Buffers()
    for phase in range(work.phases):
        for index in reversed(range(len(work.ranges))):
            work.run(phase, index, buffers)
        work.reduce(phase)
    return unpack(sink.data, out, size)
