"""Rotary position embeddings as configs describe them, in every spelling; and partial rotary written as full."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FullRotary", "Rope", "full_rotary", "read_rope"]

_PHI3_LONGROPE = ("su", "yarn", "longrope")
"""Names under which Phi-3 configs mean longrope (`yarn` is something else elsewhere)."""
_UNSCALED = (None, "default")
NO_ROTATION = 1e30
"""A factor that makes a rotary frequency vanish: such a dimension is passed through unrotated."""


@dataclass(frozen=True, slots=True)
class Rope:
    """What a config says of rotary embeddings.

    ``scaling`` is the mapping of its parameters without type and theta (empty where ``kind`` is ``default``);
    ``partial`` the fraction of each head that is rotated; ``original`` the context before any extension.
    """

    kind: str
    theta: float
    scaling: Mapping[str, Any]
    partial: float
    original: int | None


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Read the keys of transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``)."""
    record: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(key), Mapping):
            record = {**record, **config[key]}
    theta = record.pop("rope_theta", config.get("rope_theta", 10000.0))
    partial = record.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    old, kind = record.pop("type", None), record.pop("rope_type", None)
    kind = kind if kind is not None else old
    if config.get("model_type") == "phi3" and kind in _PHI3_LONGROPE:
        kind = "longrope"
    original = record.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if kind in _UNSCALED:
        record, kind = {}, "default"
    return Rope(str(kind), float(theta), record, float(partial if partial is not None else 1.0), original)


@dataclass(frozen=True, slots=True)
class FullRotary:
    """How to compute a partial rotary embedding with a full one.

    ``order`` and ``factors`` rearrange and scale the rows of each query and key head; ``short_factor`` and
    ``long_factor`` are longrope's, for all dimensions. Exact: the logits' arithmetic is the same but for one product
    with 1/s that is undone by longrope's own factor s.
    """

    order: tuple[int, ...]
    factors: tuple[float, ...]
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]


def full_rotary(rope: Rope, head: int, positions: int) -> FullRotary:
    """The full form of ``rope``, for heads of ``head`` rows and ``positions`` = max_position_embeddings.

    Rotation pairs slot i with slot i + head/2 at frequency theta^(-2i/head) / factor_i. The rotated dimensions move to
    the front of each half and their factors make up for the other exponent; the rest gets frequency zero, so it is
    multiplied by longrope's attention factor s only, which its rows are divided by.
    """
    rotated = int(head * rope.partial)
    half, passed = rotated // 2, (head - rotated) // 2
    first, second = range(half), range(half, rotated)
    rest = range(rotated, head)
    order = (*first, *rest[:passed], *second, *rest[passed:])
    given = rope.scaling.get("attention_factor")
    s = float(given) if given is not None else _attention_factor(positions, rope.original)
    factors = tuple(1.0 if row < rotated else 1.0 / s for row in order)

    def stretched(values: Any) -> tuple[float, ...]:
        factors = list(values) if values is not None else [1.0] * half
        mine = [f * rope.theta ** (2 * i / rotated - 2 * i / head) for i, f in enumerate(factors)]
        return (*mine, *[NO_ROTATION] * passed)

    return FullRotary(
        order, factors, stretched(rope.scaling.get("short_factor")), stretched(rope.scaling.get("long_factor"))
    )


def _attention_factor(positions: int, original: int | None) -> float:
    """Longrope's factor on sine and cosine: sqrt(1 + ln(max / original) / ln(original))."""
    if original is None or positions <= original:
        return 1.0
    return math.sqrt(1 + math.log(positions / original) / math.log(original))
