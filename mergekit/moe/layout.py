"""Where the tensors of a dense model and of its experts go in a mixture: names changed, fused matrices taken apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mergekit.dtypes import DType
from mergekit.errors import IncompatibleError
from mergekit.families.fused import FUSED, Part, parts
from mergekit.families.rope import full_rotary
from mergekit.moe.dense import Dense, is_mlp
from mergekit.moe.targets import Target
from mergekit.planning.express import Made
from mergekit.planning.expression import Apply, Cast, Expression, Identical, Leaf, PermuteScale, Read, Split
from mergekit.planning.leaf import cast
from mergekit.planning.models import Model

__all__ = ["Layout"]

_KEPT = frozenset(
    [
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.o_proj",
        *FUSED,
        *(name for names in FUSED.values() for name in names),
        "mlp.down_proj",
    ]
)
"""Modules of a dense layer that every target has."""
_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The tensors of one mixture in the order of the base model's: each router and its experts stand together."""

    dense: Dense
    target: Target
    dtype: DType

    def tensors(
        self, base: Model, shared: Mapping[str, Made], experts: Sequence[Mapping[str, Made]], routers: Sequence[Read]
    ) -> Iterator[Made]:
        """Every output tensor. ``shared`` holds MLPs too, as place holders; ``routers`` a leaf for each layer."""
        begun: set[int] = set()
        for name, made in shared.items():
            place = base.layout.place(name)
            if place.stack is None:
                yield made
                continue
            module, _, kind = place.suffix.rpartition(".")
            if module not in _KEPT or kind != "weight":
                raise IncompatibleError(
                    f"{base.reference}: {self.target.title} has no place for tensor {name} {list(made.shape)}"
                )
            prefix = f"model.layers.{place.index}."
            if not is_mlp(name):
                yield from self._parts(made, prefix, module)
            elif place.index not in begun:
                begun.add(place.index)
                router = routers[place.index]
                name = self.target.router.format(layer=place.index)
                yield Made(name, router.info.shape, self.dtype, cast(router, self.dtype))
                yield from self._experts(base, experts, place.index)

    def takes_apart(self, base: Model, name: str) -> bool:
        """Whether a tensor of the dense model is not stored whole, row by row as it is."""
        module = base.layout.place(name).suffix.removesuffix(".weight")
        return self.target.splits and not is_mlp(name) and (module in FUSED or self._is_rotated(module))

    def _is_rotated(self, module: str) -> bool:
        return module in _ROTATED and self.dense.rope.partial < 1 and self.target.splits

    def _experts(self, base: Model, experts: Sequence[Mapping[str, Made]], layer: int) -> Iterator[Made]:
        for number, tensors in enumerate(experts):
            for name, made in tensors.items():
                place = base.layout.place(name)
                if place.index != layer:
                    continue
                for part in self._parts(made, "", place.suffix.removesuffix(".weight")):
                    module = self.target.experts[part.name.removesuffix(".weight")].format(expert=number)
                    yield dataclasses.replace(part, name=f"model.layers.{layer}.{module}.weight")

    def _parts(self, made: Made, prefix: str, module: str) -> Iterator[Made]:
        """A tensor of a dense layer as the target stores it: whole, or the parts of a fused one."""
        found = parts(module, made.shape[0], self.dense.heads) if self.target.splits else ()
        if not found:
            expression = self._rotary(module, made.expression)
            yield dataclasses.replace(made, name=f"{prefix}{module}.weight", expression=expression)
        for part in found:
            expression = _inside(made.expression, self.dtype, partial(_rows, part))
            yield Made(
                f"{prefix}{part.name}.weight",
                (part.count, *made.shape[1:]),
                made.dtype,
                self._rotary(part.name, expression),
            )

    def _rotary(self, module: str, expression: Expression) -> Expression:
        """Query and key rows rearranged where the target has no partial rotary embedding."""
        if not self._is_rotated(module):
            return expression
        full = full_rotary(self.dense.rope, self.dense.heads.size, self.dense.positions)
        return _inside(expression, self.dtype, lambda leaf: PermuteScale(leaf, full.order, full.factors))


def _rows(part: Part, leaf: Leaf) -> Leaf:
    return Split(leaf, part.start, part.count)


def _inside(expression: Expression, dtype: DType, change: Callable[[Leaf], Leaf]) -> Expression:
    """``expression`` with ``change`` made to every tensor that it is computed from."""
    if isinstance(expression, Apply):
        return dataclasses.replace(expression, inputs=tuple(change(leaf) for leaf in expression.inputs))
    assert not isinstance(expression, Identical), "integers are not taken apart"
    return cast(change(expression.input if isinstance(expression, Cast) else expression), dtype)
