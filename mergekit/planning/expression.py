"""What gives the elements of one output tensor: a small closed set of nodes, as pure data as the plan around them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np

from mergekit.checkpoint import TensorInfo
from mergekit.dtypes import DType

__all__ = [
    "Apply",
    "Bake",
    "Cast",
    "Dequantize",
    "Dequantize4",
    "Expression",
    "Identical",
    "Leaf",
    "Noise",
    "PermuteScale",
    "Quantize4",
    "Read",
    "RowTable",
    "Rows",
    "Scales4",
    "Split",
    "inputs_of",
    "leaves",
    "row_size",
    "shape_of",
    "stored",
]


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor of source ``source``, as it is on disk."""

    source: int
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class Split:
    """The rows ``start .. start + count`` (along axis 0): a part of a fused matrix, or embeddings cut short."""

    input: Leaf
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Dequantize:
    """An fp8 matrix times its scales, one scale for each block of ``rows`` x ``columns`` elements; float32."""

    input: Read
    scale: Read
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class PermuteScale:
    """Rows rearranged inside each run of ``len(order)`` rows: row i is the run's row ``order[i]`` times ``factors[i]``.

    float32. A run is an attention head, where the slots of its rotary dimensions are renumbered.
    """

    input: Leaf
    order: tuple[int, ...]
    factors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Noise:
    """A tensor plus ``scale`` times a standard normal number for each element; float32. ``key``: the random stream."""

    input: Leaf
    scale: float
    key: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scales4:
    """The scales of a 4-bit tensor, one for each ``block`` elements: float32, or 8-bit codes with tables of their own.

    ``values`` are the scales or their codes. Where they are codes, ``table`` gives the numbers that codes stand for and
    ``scales`` a scale for each ``outer`` codes; ``offset`` is added in the end.
    """

    values: Read
    block: int
    table: Read | None = None
    scales: Read | None = None
    outer: int = 0
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Dequantize4:
    """A tensor packed into 4 bits an element: what its code stands for times its scale, rounded to ``dtype``; float32.

    ``input`` holds two codes a byte, ``table`` the 16 numbers.
    """

    input: Read
    table: Read
    scales: Scales4
    shape: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class Quantize4:
    """What is left of a tensor, cast to ``dtype``, after quantising to 4 bits and back to ``dtype``; float32.

    ``scheme`` is ``nf4``, ``nf4-double`` (the scales are quantised, too) or ``fp4``.
    """

    input: Leaf
    scheme: str
    dtype: DType


@dataclass(frozen=True, slots=True)
class Bake:
    """A matrix W [out, in] plus its adapter: W + scale B A, with ``a`` [rank, in] and ``b`` [out, rank]; float32.

    With a ``magnitude`` m [out] (DoRA) each row of that is brought to length m. ``transposed``: W is stored [in, out].
    """

    input: Leaf
    a: Read
    b: Read
    magnitude: Read | None
    scale: float
    transposed: bool


@dataclass(frozen=True, slots=True)
class RowTable:
    """What each of ``rows`` rows is made of: for each of ``inputs`` tensors the number of one of its rows, or -1.

    A row is the mean of the rows named for it, zero if there are none, and the mean of all other rows of the result if
    one of the numbers is ``MEAN``. ``data`` is little-endian int32 [inputs, rows]; ``digest`` stands for it where
    plans are compared and printed.
    """

    inputs: int
    rows: int
    digest: str
    data: bytes = field(repr=False, compare=False)

    MEAN: ClassVar[int] = -2

    @classmethod
    def of(cls, numbers: np.ndarray) -> RowTable:
        """The table of an array of whole numbers [inputs, rows]."""
        data = np.ascontiguousarray(numbers, "<i4").tobytes()
        inputs, rows = numbers.shape
        return cls(inputs, rows, blake2b(data, digest_size=12).hexdigest(), data)

    @property
    def numbers(self) -> np.ndarray:
        """int32 [inputs, rows], read-only."""
        return np.frombuffer(self.data, "<i4").reshape(self.inputs, self.rows)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows gathered from tensors of one width as ``table`` says: embeddings in another vocabulary; float32."""

    inputs: tuple[Leaf, ...]
    table: RowTable


Leaf = Read | Split | Dequantize | PermuteScale | Noise | Dequantize4 | Quantize4 | Bake | Rows
"""What gives the elements of one tensor. Leaves may be nested; all but ``Read`` and ``Split`` give float32."""


@dataclass(frozen=True, slots=True)
class Identical:
    """Integer or boolean tensors that must be equal byte for byte; the result is the first of them."""

    inputs: tuple[Read, ...]


@dataclass(frozen=True, slots=True)
class Apply:
    """A merge method on tensors of one shape.

    ``models`` are the recipe positions of the inputs (they key the random masks). ``has_base``: the first input is
    the base. ``parameters`` are the keyword arguments of the method's function, resolved for this tensor. ``scale`` is
    a factor on the merged delta. ``weighting`` names what the weights are to be multiplied by before the run. ``svc``
    is the alpha with which the merged delta is calibrated before it is scaled (``methods.svc``); None: it isn't.
    """

    method: str
    inputs: tuple[Leaf, ...]
    models: tuple[int, ...]
    has_base: bool
    parameters: tuple[tuple[str, Any], ...]
    scale: float = 1.0
    weighting: str = "none"
    svc: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters by the names of recipes, and what options change, for people to read."""
        found = {name.rstrip("_"): value for name, value in self.parameters}
        options = {"factor": (self.scale, 1.0), "weighting": (self.weighting, "none"), "svc": (self.svc, None)}
        return {**found, **{name: value for name, (value, default) in options.items() if value != default}}


@dataclass(frozen=True, slots=True)
class Cast:
    """One tensor in another element type."""

    input: Leaf


Expression = Leaf | Identical | Apply | Cast


def leaves(expression: Expression) -> Iterator[Read]:
    """Every tensor that an expression reads."""
    if isinstance(expression, Read):
        yield expression
    elif isinstance(expression, Identical | Apply | Rows):
        for part in expression.inputs:
            yield from leaves(part)
    else:
        yield from leaves(expression.input)
        yield from (read for read in _others(expression) if read is not None)


def _others(expression: Leaf | Cast) -> tuple[Read | None, ...]:
    """What an expression reads besides its input."""
    if isinstance(expression, Dequantize):
        return (expression.scale,)
    if isinstance(expression, Dequantize4):
        scales = expression.scales
        return (expression.table, scales.values, scales.table, scales.scales)
    if isinstance(expression, Bake):
        return (expression.a, expression.b, expression.magnitude)
    return ()


def inputs_of(expression: Expression) -> tuple[Leaf, ...]:
    """The leaves that an expression is made of."""
    if isinstance(expression, Apply | Identical):
        return expression.inputs
    return (expression.input if isinstance(expression, Cast) else expression,)


def stored(leaf: Leaf) -> DType | None:
    """The element type of a leaf whose bytes are those of a file; None for one that is computed, in float32."""
    while isinstance(leaf, Split):
        leaf = leaf.input
    return leaf.info.dtype if isinstance(leaf, Read) else None


def shape_of(leaf: Leaf) -> tuple[int, ...]:
    """The shape of what a leaf gives."""
    if isinstance(leaf, Read):
        return leaf.info.shape
    if isinstance(leaf, Dequantize4):
        return leaf.shape
    if isinstance(leaf, Rows):
        return (leaf.table.rows, *shape_of(leaf.inputs[0])[1:])
    shape = shape_of(leaf.input)
    return (leaf.count, *shape[1:]) if isinstance(leaf, Split) else shape


def row_size(leaf: Leaf) -> int:
    """Elements of one row of a leaf."""
    return math.prod(shape_of(leaf)[1:])
