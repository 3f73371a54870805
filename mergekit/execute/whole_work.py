"""The work of the ``whole`` form: tensors read whole, and any function of them."""

from __future__ import annotations

import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mergekit.dtypes import F32
from mergekit.errors import RunError
from mergekit.execute.arrays import ArrayReader, ArraySink, empty
from mergekit.execute.buffers import Buffers
from mergekit.execute.float_work import MergeWork
from mergekit.execute.inputs import Reader, read_floats
from mergekit.execute.work import Job
from mergekit.methods import Whole, get_method
from mergekit.methods.guard import guarded
from mergekit.methods.svc import WORKSPACE, svc, svc_seconds
from mergekit.planning.expression import Apply
from mergekit.planning.plan import Plan

if TYPE_CHECKING:
    import torch

__all__ = ["CalibratedWork", "WholeWork", "estimated_seconds"]

_ONE_AT_A_TIME = threading.Lock()
"""torch computes on all processors by itself, and what a whole tensor needs is held once."""
_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory")
_THREADS = 4
"""Threads that read the inputs and merge beforehand. No result depends on it."""


def estimated_seconds(plan: Plan) -> float:
    """About how long the functions of whole tensors take on two processors; 0 if a plan has none."""
    return sum(_seconds(o.expression, o.shape) for o in plan.outputs if isinstance(o.expression, Apply))


def _seconds(apply: Apply, shape: tuple[int, ...]) -> float:
    method = get_method(apply.method)
    count = len(apply.inputs) - (apply.has_base and method.form.space == "deltas")
    form = guarded(method, f"of shape {list(shape)}", count).form
    own = form.seconds(shape, count, **dict(apply.parameters)) if isinstance(form, Whole) and form.seconds else 0.0
    return own + (svc_seconds(shape, count) if apply.svc is not None else 0.0)


class WholeWork(MergeWork):
    """A function of whole tensors. Phases: all of them read, and the function; then the result, range by range."""

    phases = 2

    def __init__(self, apply: Apply, job: Job) -> None:
        super().__init__(apply, job)
        self._origin = self.base if self.method.form.space == "deltas" else -1
        self._result = np.empty(0, np.float32)

    @classmethod
    def held(cls, apply: Apply, shape: tuple[int, ...], threads: int) -> int:
        """The inputs, the result, and what the function holds besides."""
        form = get_method(apply.method).form
        workspace = form.workspace if isinstance(form, Whole) else 0.0
        return int(4 * math.prod(shape) * (len(apply.inputs) + 1 + workspace))

    def run(self, phase: int, index: int, buffers: Buffers) -> None:
        """Ranges are of the last phase; the function sees whole tensors."""
        if phase == self.phases - 1:
            super().run(phase, index, buffers)

    def merge(self, state: Any, rows: np.ndarray, at: int, count: int, out: np.ndarray, code: int) -> bool:
        part = self._result[at : at + count]
        if self._origin >= 0:
            base = np.empty(count, np.float32)
            self._decode(rows[self._origin], self._origin, count, base)
            # As a block computed by a kernel: a sum in float32, rounded once.
            part = base + np.float32(self.apply.scale) * part
        return bool(self.kernels.store(part, count, out, code))

    def _decode(self, row: np.ndarray, reader: int, count: int, out: np.ndarray) -> None:
        from mergekit.kernels import codec

        codec.decode(row, codec.CODES[self.readers[reader].dtype], 0, count, out)

    def reduce(self, phase: int) -> None:
        if phase == 0 and self.ranges:
            with _ONE_AT_A_TIME:
                self._result = self._compute()
        elif phase == self.phases - 1:
            self._result = np.empty(0, np.float32)
        super().reduce(phase)

    def _compute(self) -> np.ndarray:
        """The function's result, float32 [size]."""
        import torch

        try:
            with torch.no_grad():
                x = [torch.from_numpy(values).reshape(self.output.shape) for values in self._load()]
                device = _device(self.kernels)
                result = self.solve([t.to(device) for t in x])
                return result.to("cpu", torch.float32).resolve_neg().contiguous().reshape(-1).numpy()
        except (RuntimeError, MemoryError) as error:  # each kind of device has its own class of it
            if not isinstance(error, MemoryError) and not _MEMORY.search(str(error)):
                raise
            raise RunError(
                f"tensor {self.output.name} is too large for '{self.apply.method}' in the memory that there is"
            ) from None

    def solve(self, x: list[torch.Tensor]) -> torch.Tensor:
        """The result, or the merged delta, from the inputs or deltas."""
        result: torch.Tensor = self.method.function(x, **self.parameters)
        return result

    def _load(self) -> list[np.ndarray]:
        """Every input, or its difference from the base, float32 [size]."""
        models = [m for m in range(len(self.readers)) if m != self._origin]
        values = [np.empty(self.size, np.float32) for _ in models]

        def fill(place: tuple[int, int]) -> None:
            start, count = place
            base = np.empty(count if self._origin >= 0 else 0, np.float32)
            if self._origin >= 0:
                read_floats(self.readers[self._origin], start, count, base)
            for m, whole in zip(models, values, strict=True):
                part = whole[start : start + count]
                read_floats(self.readers[m], start, count, part)
                if self._origin >= 0:
                    part -= base

        blocks = [(at, n) for start, count in self.ranges for at, n in self.blocks(start, count, False)]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fill, blocks))
        return values


class CalibratedWork(WholeWork):
    """A method of deltas whose merged delta is calibrated (SVC) before it is added to the base."""

    @classmethod
    def held(cls, apply: Apply, shape: tuple[int, ...], threads: int) -> int:
        """The deltas, the merged delta, and what the calibration or the method holds besides, whichever is more."""
        inner = _inner(apply)
        size = 4 * math.prod(shape)
        own = _work_class(inner).held(inner, shape, threads)
        return size * (len(apply.inputs) + 2) + max(own, int(size * WORKSPACE))

    @classmethod
    def compiled(cls, apply: Apply) -> tuple[str, ...]:
        """Those of the method's own work."""
        return _work_class(_inner(apply)).compiled(_inner(apply))

    def __init__(self, apply: Apply, job: Job) -> None:
        # Calibration would undo a factor that comes before it.
        parameters = dict(apply.parameters)
        self._factor = float(parameters.get("lambda_", 1.0))
        if "lambda_" in parameters:
            apply = replace(apply, parameters=tuple(sorted({**parameters, "lambda_": 1.0}.items())))
        super().__init__(apply, job)

    def solve(self, x: list[torch.Tensor]) -> torch.Tensor:
        """The merged delta, calibrated, and then multiplied by the method's ``lambda``."""
        assert self.apply.svc is not None
        merged = super().solve(x) if isinstance(self.method.form, Whole) else self._merged(x)
        weights = self.parameters.get("weight", ())
        taken = [delta for m, delta in enumerate(x) if m >= len(weights) or weights[m] != 0] or x
        return self._factor * svc(merged, taken, self.apply.svc)

    def _merged(self, x: list[torch.Tensor]) -> torch.Tensor:
        """The merged delta by the method's own work, on a base of zeros: no digit is lost beside the base."""

        apply, like = _inner(self.apply), x[0]
        merged, data = empty(like, F32)
        output = replace(self.output, dtype=F32, offset=0, nbytes=4 * self.size, expression=apply)
        readers: tuple[Reader, ...] = (_Zeros(), *map(ArrayReader, x))
        job = replace(self.job, output=output, readers=readers, sink=ArraySink(data), allow_nonfinite=True,
                      rounding="nearest", statistics=False)  # fmt: skip
        work = _work_class(apply)(apply, job)
        with ThreadPoolExecutor(_THREADS) as pool:
            for phase in range(work.phases):
                list(pool.map(partial(_run, work, phase), range(len(work.ranges))))
                work.reduce(phase)
        return cast("torch.Tensor", merged.to(like.device))


def _run(work: MergeWork, phase: int, index: int) -> None:
    """One range of a work, with buffers of its own."""
    work.run(phase, index, Buffers())


def _inner(apply: Apply) -> Apply:
    """The same merge without its calibration, and without the factor that comes after it."""
    return replace(apply, svc=None, scale=1.0)


def _work_class(apply: Apply) -> type[MergeWork]:
    from mergekit.execute.merge_work import work_class  # which picks the classes of this module

    return work_class(apply)


def _device(kernels: Any) -> torch.device:
    """Where to compute: CUDA where the merge does, else the processor; others lack float64 or decompositions."""
    import torch

    device = getattr(kernels, "device", None)
    return device if device is not None and device.type == "cuda" else torch.device("cpu")


class _Zeros:
    """Gives zeros, as many as are asked for."""

    dtype, offset = F32, -1

    def read(self, start: int, count: int, row: np.ndarray) -> None:
        row[: 4 * count] = 0
