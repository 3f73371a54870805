"""Decide how each output tensor is computed: shapes, dtypes, missing tensors, resolved parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit.checkpoint import TensorInfo
from mergekit.dtypes import DType, promote, recipe_dtype
from mergekit.errors import IncompatibleError, some_of
from mergekit.families.config import vocab_size
from mergekit.families.layout import is_embedding, is_head, is_per_token
from mergekit.methods import Flag, Method, ParameterError, get_method
from mergekit.methods.guard import guarded, rehearse
from mergekit.methods.spec import Parameter
from mergekit.methods.spectral import matrix_shape
from mergekit.planning.expression import Apply, Expression, Identical, Leaf, Read, Split
from mergekit.planning.leaf import cast, leaf_of
from mergekit.planning.models import Models
from mergekit.planning.slots import Contribution, Slot
from mergekit.planning.vocabulary import Alignment
from mergekit.recipe import EMBED_SLERP, EMBEDDING_OPTIONS, Recipe
from mergekit.recipe.resolve import InputScope, MissingParameterError, resolve_parameters
from mergekit.recipe.settings import evaluate_setting, first_match
from mergekit.refs import ModelReference

__all__ = ["Expresser", "Listener", "Made", "cast"]

Listener = Callable[[Slot, Parameter, int | None, Any, Mapping[str, Any] | None, tuple[str | int, ...]], None]
"""Hears of each value that is resolved: as ``recipe.resolve.Told``, with the slot first and models by position."""
_OF_EMBEDDINGS = {option.name: option.default for option in EMBEDDING_OPTIONS}


@dataclass(frozen=True, slots=True)
class Made:
    """What an output tensor is: name, shape, element type and expression."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    expression: Expression

    def nbytes(self, dtype: DType) -> int:
        """The size of the tensor in element type ``dtype``."""
        return math.prod(self.shape) * dtype.size


@dataclass(slots=True, eq=False)
class Expresser:
    """Turns slots into expressions, gathering warnings, tensors left out and the vocabulary's new size on the way."""

    recipe: Recipe
    models: Models
    alignment: Alignment | None
    truncate: bool
    listener: Listener | None = None
    warnings: dict[str, list[str]] = field(default_factory=dict)
    rows: int | None = None
    _by_model: dict[ModelReference, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read ``input_model_parameters`` once."""
        for name, values in (self.recipe.config.input_model_parameters or {}).items():
            self._by_model[ModelReference.parse(name)] = values

    def make(self, slot: Slot) -> Made | None:
        """The output tensor of ``slot``; None if it is left out (a warning says so)."""
        present = [c for c in slot.contributions if c.info is not None]
        if not present:
            return None
        if slot.is_copy:
            keep = next((c for c in present if c.model == self.models.donor), present[0])
            return self._copy(slot, keep)
        present = self._with_missing(slot, present)
        infos = [c.info for c in present if c.info is not None]
        if not all(info.dtype.is_float or info.dtype.kind == "fp8" for info in infos):
            return self._identical(slot, present, infos)
        leaves, shape = self._leaves(slot, present, infos)
        dtype = self._dtype(infos)
        base = next((i for i, c in enumerate(present) if c.model == slot.base), None)
        if len(present) == 1 and self._passes_alone(slot, present[0]):
            return Made(slot.name, shape, dtype, cast(leaves[0], dtype))
        method = self._method(slot, present)
        if method is not self.recipe.method and base is None:
            base = 0  # embed_slerp goes from the first model to the second
        if method.base == "required" and base is None:
            raise IncompatibleError(
                f"cannot merge {slot.name}: '{method.name}' needs the base's copy, and the base lacks it"
                + self._table(slot)
            )
        if not self._enough(slot, present, base):
            return None
        order = list(range(len(present)))
        if method.base != "ignored" and base is not None:
            order = [base, *(i for i in order if i != base)]
        values = self._parameters(method, slot, present, base, order)
        options = {p.argument: values.pop(p.argument) for p in method.options}
        apply = Apply(
            method.name,
            tuple(leaves[i] for i in order),
            tuple(present[i].model for i in order),
            method.base != "ignored" and base is not None,
            tuple(sorted(values.items())),
            scale=options.get("lines_alpha", 1.0) + options.get("lines_beta", 0.0) * slot.depth,
            weighting=options.get("weighting", "none"),
            svc=options.get("svc") if matrix_shape(shape) else None,
        )
        return Made(slot.name, shape, dtype, self._simplify(method, slot, apply, values, dtype))

    def _with_missing(self, slot: Slot, present: list[Contribution]) -> list[Contribution]:
        """Models that lack a tensor take no part in it, with a warning; a stand-in for a tied head needs none."""
        missing = [c for c in slot.contributions if c.info is None]
        if missing and len(slot.contributions) > 1:
            names = ", ".join(self.models[c.model].reference.short for c in missing)
            self._warn(f"{names} lack(s) these tensors, which are made from the other models", slot.name)
        return present

    def _passes_alone(self, slot: Slot, only: Contribution) -> bool:
        if len(slot.contributions) == 1:
            return False
        if self.recipe.method.lone == "pass":
            return True
        return self.recipe.method.base == "required" and only.model == slot.base

    def _method(self, slot: Slot, present: Sequence[Contribution]) -> Method:
        """The method that merges a slot: the recipe's, but for embeddings that ``embed_slerp`` asks for."""
        is_matrix = all(c.info is not None and len(c.info.shape) == 2 for c in present)
        if self.alignment is None or not is_matrix or not self._has_vocabulary(slot.name, present):
            return self.recipe.method
        scopes = [scope for scope in (slot.scope, *slot.outer) if EMBED_SLERP in scope]
        found = (evaluate_setting(slot.name, scope[EMBED_SLERP], slot.t, Flag()) for scope in scopes)
        if not next((value for value in found if value is not None), False):
            return self.recipe.method
        if len(present) != 2:
            raise self.recipe.fault(
                f"'{EMBED_SLERP}' interpolates between two models, but {slot.name} is merged from {len(present)}",
                *slot.path,
            )
        return get_method("slerp")

    def _enough(self, slot: Slot, present: Sequence[Contribution], base: int | None) -> bool:
        """Whether the method can merge the inputs that there are; else the tensor is refused, or skipped (False)."""
        method = self.recipe.method
        count = len(present) - (method.base == "optional" and base is not None)
        if method.takes(count):
            return True
        if method.lone == "skip":
            self._warn(f"too few models have these tensors for '{method.name}'; they are left out", slot.name)
            return False
        raise IncompatibleError(
            f"cannot merge {slot.name}: only {len(present)} of the models have it, too few for '{method.name}'"
            + self._table(slot)
        )

    def _copy(self, slot: Slot, only: Contribution) -> Made:
        assert only.info is not None
        leaf = leaf_of(self.models, only.model, only.info.name)
        return Made(slot.name, only.info.shape, only.info.dtype, cast(leaf, only.info.dtype))

    def _identical(self, slot: Slot, present: Sequence[Contribution], infos: Sequence[TensorInfo]) -> Made:
        first = infos[0]
        if any((i.dtype, i.shape) != (first.dtype, first.shape) for i in infos):
            raise IncompatibleError(
                f"cannot merge {slot.name}: integer tensors must be the same in every model" + self._table(slot)
            )
        reads = tuple(Read(c.model, info) for c, info in zip(present, infos, strict=True))
        return Made(slot.name, first.shape, first.dtype, reads[0] if len(reads) == 1 else Identical(reads))

    def _leaves(
        self, slot: Slot, present: Sequence[Contribution], infos: Sequence[TensorInfo]
    ) -> tuple[list[Leaf], tuple[int, ...]]:
        if self.alignment is not None and self._has_vocabulary(slot.name, present):
            self.rows = self.alignment.rows
            return self.alignment.leaves(slot.name, present), (self.rows, *infos[0].shape[1:])
        reads: list[Leaf] = [leaf_of(self.models, c.model, info.name) for c, info in zip(present, infos, strict=True)]
        shapes = {info.shape for info in infos}
        if len(shapes) == 1:
            return reads, infos[0].shape
        rest = {shape[1:] for shape in shapes}
        if len(rest) == 1 and all(shape for shape in shapes) and self._has_vocabulary(slot.name, present):
            rows = min(shape[0] for shape in shapes)
            if not self.truncate:
                raise IncompatibleError(
                    f"cannot merge {slot.name}: the vocabularies differ in size" + self._table(slot) + "\nConfigure a "
                    "tokenizer ('tokenizer_source: union' or 'base'), or pass --unsafe-truncate-embeddings to keep "
                    f"the first {rows} rows."
                )
            self.rows = rows if self.rows is None else min(self.rows, rows)
            self._warn(f"vocabularies differ in size: only the first {rows} rows are kept", slot.name)
            return [self._cut(leaf, info, rows) for leaf, info in zip(reads, infos, strict=True)], (
                rows,
                *infos[0].shape[1:],
            )
        raise IncompatibleError(
            f"cannot merge {slot.name}: shapes differ" + self._table(slot) + "\nThese models don't fit together; "
            "merge models that were fine-tuned from the same base."
        )

    def _cut(self, leaf: Leaf, info: TensorInfo, rows: int) -> Leaf:
        if info.shape[0] == rows:
            return leaf
        return Split(leaf, 0, rows)

    def _has_vocabulary(self, name: str, present: Sequence[Contribution]) -> bool:
        """Whether the rows of a tensor belong to tokens: embeddings, heads, and biases of heads."""
        if is_embedding(name) or is_head(name) or is_per_token(name):
            return True
        if not name.endswith("bias"):
            return False
        for c in present:
            model = self.models[c.model]
            rows = model.tensors[model.embedding].shape[0] if model.embedding else vocab_size(model.config)
            if c.info is None or c.info.shape != (rows,) or model.layout.place(c.info.name).stack is not None:
                return False
        return True

    def _dtype(self, infos: Sequence[TensorInfo]) -> DType:
        config = self.recipe.config
        text = config.out_dtype or config.dtype
        chosen = recipe_dtype(text) if text else None
        return chosen or promote(info.dtype for info in infos)

    def _parameters(
        self, method: Method, slot: Slot, present: Sequence[Contribution], base: int | None, order: Sequence[int]
    ) -> dict[str, Any]:
        scopes = [
            InputScope(
                _filter_name(slot, present[i]),
                present[i].own,
                self._by_model.get(self.models[present[i].model].reference, {}),
                i == base,
            )
            for i in order
        ]

        def told(parameter: Parameter, index: int | None, value: Any, scope: Any, path: tuple[str | int, ...]) -> None:
            if self.listener is not None:
                model = None if index is None else present[order[index]].model
                self.listener(slot, parameter, model, value, scope, path)

        try:
            outer = slot.outer if method is self.recipe.method else (*slot.outer, {"t": _OF_EMBEDDINGS["t"]})
            return resolve_parameters(method, slot.name, slot.t, scopes, slot.scope, outer, told)
        except MissingParameterError as error:
            whose = "" if error.index is None else f" for {self.models[present[order[error.index]].model].reference}"
            where = (
                "under 'parameters'" if error.index is None else "under the model's 'parameters', or at the top level"
            )
            advice = f"give it {where}"
            if error.given is not None:
                is_empty = first_match(error.given, slot.name)[0] == []
                advice = f"what is given {'is an empty list' if is_empty else 'has filters that leave it out'}"
            raise self.recipe.fault(
                f"'{method.name}' needs '{error.name}'{whose} (tensor {slot.name}); {advice}",
                *self._place(slot, None if error.index is None else present[order[error.index]]),
            ) from None
        except ParameterError as error:
            raise self.recipe.fault(f"{error} (tensor {slot.name})", *slot.path) from None

    def _place(self, slot: Slot, contribution: Contribution | None) -> tuple[str | int, ...]:
        """The path in the recipe of the entry that a contribution comes from; the slot's own where it has none."""
        if contribution is None:
            return slot.path
        path = slot.path if slot.path[-1] == "models" else (*slot.path, "sources")
        entries: Any = self.recipe.config.model_dump()
        for step in path:
            entries = entries[step]
        reference = self.models[contribution.model].reference
        found = [i for i, entry in enumerate(entries) if ModelReference.model_validate(entry["model"]) == reference]
        return (*path, found[0]) if found else slot.path

    def _simplify(
        self, method: Method, slot: Slot, apply: Apply, parameters: dict[str, Any], dtype: DType
    ) -> Expression:
        """Call the method where it needs no data: faults show now, and a plain copy is planned as one."""
        count = len(apply.inputs) - (apply.has_base and method.form.space == "deltas")
        try:
            only = rehearse(guarded(method, slot.name, count), parameters)
        except ParameterError as error:
            raise self.recipe.fault(f"{error} (tensor {slot.name})", *slot.path) from None
        if only is not None:
            return cast(apply.inputs[only], dtype)
        if len(apply.inputs) == 1 and apply.has_base:
            return cast(apply.inputs[0], dtype)
        return apply

    def _table(self, slot: Slot) -> str:
        lines = []
        for c in slot.contributions:
            model = self.models[c.model]
            what = "has no such tensor" if c.info is None else f"{c.info}  {c.info.file}"
            lines.append(f"\n  {model.reference}  {what}")
        return "".join(lines[:6])

    def _warn(self, text: str, tensor: str) -> None:
        self.warnings.setdefault(text, []).append(tensor)

    def all_warnings(self) -> list[str]:
        """The warnings, each with the tensors that it concerns (named up to three)."""
        return [f"{text}: {some_of(names)}" for text, names in self.warnings.items()]


def _filter_name(slot: Slot, contribution: Contribution) -> str:
    """The name that filters see: the tensor's own in that model; for a stand-in, the name it stands in for."""
    return slot.name if contribution.tied else contribution.name
