"""Element types: their names in recipes, codes in safetensors files, sizes, and how they promote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["BY_CODE", "DType", "promote", "recipe_dtype", "recipe_dtypes"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    ``code`` is the safetensors code, ``size`` the bytes of one element; ``kind`` is ``float`` (can be merged),
    ``fp8`` (merged only together with its scales), ``int`` or ``bool`` (copied when identical, never cast).
    """

    name: str
    code: str
    size: int
    kind: str

    def __str__(self) -> str:
        """The name used in recipes and config.json: ``bfloat16``."""
        return self.name

    @property
    def is_float(self) -> bool:
        """Whether tensors of this type can be computed with as they are."""
        return self.kind == "float"


BF16 = DType("bfloat16", "BF16", 2, "float")
F16 = DType("float16", "F16", 2, "float")
F32 = DType("float32", "F32", 4, "float")
F64 = DType("float64", "F64", 8, "float")
F8_E4M3 = DType("float8_e4m3fn", "F8_E4M3", 1, "fp8")
F8_E5M2 = DType("float8_e5m2", "F8_E5M2", 1, "fp8")

_ALL = (
    BF16,
    F16,
    F32,
    F64,
    F8_E4M3,
    F8_E5M2,
    DType("int8", "I8", 1, "int"),
    DType("uint8", "U8", 1, "int"),
    DType("int16", "I16", 2, "int"),
    DType("uint16", "U16", 2, "int"),
    DType("int32", "I32", 4, "int"),
    DType("uint32", "U32", 4, "int"),
    DType("int64", "I64", 8, "int"),
    DType("uint64", "U64", 8, "int"),
    DType("bool", "BOOL", 1, "bool"),
)
BY_CODE: dict[str, DType] = {d.code: d for d in _ALL}
"""Every element type that a safetensors file may hold and we understand, by its code."""

_RECIPE_NAMES: dict[str, DType] = {
    **{d.name: d for d in (BF16, F16, F32, F64)},
    "bf16": BF16,
    "fp16": F16,
    "half": F16,
    "fp32": F32,
    "float": F32,
}


def recipe_dtype(text: str) -> DType | None:
    """The floating type that a recipe names (``bfloat16``, ``torch.float16``, ``bf16``), or None if there is none.

    >>> recipe_dtype("torch.float16").code
    'F16'
    """
    return _RECIPE_NAMES.get(text.removeprefix("torch."))


def recipe_dtypes() -> tuple[str, ...]:
    """The names that recipes may use, without ``torch.`` before them."""
    return tuple(_RECIPE_NAMES)


def promote(dtypes: Iterable[DType]) -> DType:
    """The smallest floating type that holds all of ``dtypes``: bfloat16 with float16 gives float32.

    fp8 counts as bfloat16, in which its dequantised values are usually stored.

    >>> promote([BF16, F16]).name
    'float32'
    """
    kinds = {BF16 if d.kind == "fp8" else d for d in dtypes}
    if F64 in kinds:
        return F64
    if F32 in kinds or {BF16, F16} <= kinds:
        return F32
    return F16 if F16 in kinds else BF16
