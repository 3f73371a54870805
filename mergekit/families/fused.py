"""Matrices that some families store fused and others apart: query, key and value; gate and up of an MLP."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FUSED", "Heads", "Part", "parts"]

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Fused modules of Phi-3 and the modules of Llama that they hold, in the order of their rows."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The sizes of attention: query heads, key and value heads, and rows of each."""

    query: int
    key_value: int
    size: int


@dataclass(frozen=True, slots=True)
class Part:
    """Rows ``start .. start + count`` of a fused matrix, which other families call ``name``."""

    name: str
    start: int
    count: int


def parts(module: str, rows: int, heads: Heads) -> tuple[Part, ...]:
    """The parts of the fused matrix ``module`` with ``rows`` rows; empty if it is not a fused one.

    ValueError if the rows are not those of ``heads``.

    >>> [p.count for p in parts("self_attn.qkv_proj", 32, Heads(4, 2, 4))]
    [16, 8, 8]
    """
    names = FUSED.get(module)
    if names is None:
        return ()
    counts = [rows // 2] * 2
    if len(names) == 3:
        counts = [heads.query * heads.size, heads.key_value * heads.size, heads.key_value * heads.size]
    if sum(counts) != rows:
        raise ValueError(f"{rows} rows, but the config's sizes make {sum(counts)}")
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return tuple(Part(n, s, c) for n, s, c in zip(names, starts, counts, strict=True))
