"""Which tensors the output has, and which input tensors each of them is made of: layers mapped, names aligned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.checkpoint import TensorInfo
from mergekit.errors import IncompatibleError
from mergekit.families.align import align, core
from mergekit.families.config import has_no_head, is_encoder_decoder, is_tied
from mergekit.families.layout import is_derived_buffer, is_head
from mergekit.families.stacking import LayerSource
from mergekit.planning.models import Model, Models
from mergekit.recipe import Recipe
from mergekit.recipe.schema import InputModelDefinition, OutputSliceDefinition
from mergekit.refs import ModelReference

__all__ = ["Contribution", "Slot", "Slots", "find_slots"]


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """One input of an output tensor: the model, its tensor (None: it has none), and the parameters it carries.

    ``name`` is what the tensor is called there (or would be); ``tied``: it is the embedding, standing in for a head.
    """

    model: int
    name: str
    info: TensorInfo | None
    own: Mapping[str, Any]
    tied: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One output tensor before it is decided how to compute it. ``path`` is its place in the recipe.

    ``t`` is the place in its slice at which gradients are read, ``depth`` that in the output: 0 in the first layer and
    outside the layers, 1 in the last.
    """

    name: str
    t: float
    contributions: tuple[Contribution, ...]
    base: int | None
    scope: Mapping[str, Any]
    outer: tuple[Mapping[str, Any], ...]
    path: tuple[str | int, ...]
    is_copy: bool = False
    depth: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Every output tensor; where stacking changed the layers, ``layers`` says where each comes from."""

    slots: tuple[Slot, ...]
    layers: tuple[LayerSource, ...] | None
    left_out: tuple[tuple[int, str, str], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Input:
    """A source of a slice: its model, first layer and own parameters.

    ``names`` are its names for tensors that the lead spells otherwise; ``suffixes`` the same inside layers.
    """

    model: int
    start: int
    own: Mapping[str, Any]
    names: Mapping[str, str]
    suffixes: Mapping[str, str]


def find_slots(recipe: Recipe, models: Models) -> Slots:
    """Map the recipe onto tensors. IncompatibleError where layers don't line up."""
    config = recipe.config
    if config.modules:
        only = list(config.modules)
        if only != ["default"]:
            raise recipe.fault(
                "modules other than 'default' are not built yet; a plain 'models' or 'slices' recipe merges every "
                "part of a model",
                "modules",
                next(name for name in only if name != "default"),
            )
        module = config.modules["default"]
        outer = (module.parameters or {}, config.parameters or {})
        path: tuple[str | int, ...] = ("modules", "default")
        finder = _Finder(recipe, models, outer, path)
        return finder.stack(module.slices) if module.slices else finder.whole(module.models or [])
    finder = _Finder(recipe, models, (config.parameters or {},), ())
    return finder.stack(config.slices) if config.slices else finder.whole(config.models or [])


class _Finder:
    """The work of ``find_slots`` for one module."""

    def __init__(
        self, recipe: Recipe, models: Models, outer: tuple[Mapping[str, Any], ...], path: tuple[str | int, ...]
    ) -> None:
        self.recipe, self.models, self.outer, self.path = recipe, models, outer, path
        self.used: set[tuple[int, str]] = set()
        self.slots: list[Slot] = []
        self.layers_used: dict[int, set[int]] = {}
        self._shapes: dict[ModelReference, dict[str, set[tuple[int, ...]]]] = {}

    def whole(self, entries: Sequence[InputModelDefinition]) -> Slots:
        """Whole models: every tensor of the donor, from all models."""
        donor = self.models[self.models.donor]
        inputs = []
        for entry in entries:
            inputs.append(self._input(self.models.position(entry.model), 0, entry.parameters or {}, donor))
        if self.models.base is not None and self.models.base not in [i.model for i in inputs]:
            inputs.append(self._input(self.models.base, 0, {}, donor))
        for i, item in enumerate(inputs):
            self._same_depth(donor, self.models[item.model], (*self.path, "models", min(i, len(entries) - 1)))
        for name in self._in_order(donor, donor.tensors):
            self._add(name, name, donor.layout.depth(name), inputs, self.models.base, {}, (*self.path, "models"))
        self._add_missing_head(donor, inputs, self.models.base, {}, (*self.path, "models"))
        return self._slots(None)

    def stack(self, outputs: Sequence[OutputSliceDefinition]) -> Slots:
        """Slices: layers renumbered 0, 1, 2, ...; what comes before is the first slice's, after it the last's."""
        donor = self.models[self.models.donor]
        if donor.layout.main is None:
            raise IncompatibleError(f"{donor.reference}: no numbered layers found, so it can't be sliced")
        if is_encoder_decoder(donor.config):
            raise IncompatibleError(
                f"{donor.reference} has an encoder and a decoder, and 'slices' can't tell their layers apart; "
                "merge whole models with 'models'"
            )
        layers: list[LayerSource] = []
        plans = [self._slice(i, output, donor) for i, output in enumerate(outputs)]
        for role, (inputs, base, scope, path, _, lead) in (("first", plans[0]), ("last", plans[-1])):
            names = [
                n for n in self._in_order(lead, lead.tensors) if self._outside(lead, n) and lead.layout.role(n) == role
            ]
            spelling = align(lead.tensors, donor.tensors)
            if role == "last":
                self._add_layers(plans, donor, layers)
            for name in names:
                self._add(spelling.get(name, name), name, lead.layout.depth(name), inputs, base, scope, path)
            if role == "last":
                self._add_missing_head(donor, inputs, base, scope, path)
        return self._slots(tuple(layers))

    def _slots(self, layers: tuple[LayerSource, ...] | None) -> Slots:
        names = [slot.name for slot in self.slots]
        assert len(names) == len(set(names)), "two output tensors of one name"
        return Slots(tuple(self.slots), layers, self._left_out(sliced=layers is not None))

    def _add_layers(self, plans: list[Any], donor: Model, layers: list[LayerSource]) -> None:
        assert donor.layout.main is not None
        shapes = self._layer_shapes(donor)
        total = sum(length for _, _, _, _, length, _ in plans)
        for inputs, base, scope, path, length, lead in plans:
            start = next(i.start for i in inputs if self.models[i.model] is lead)
            spelling = align(self._layer_shapes(lead), shapes)
            for k in range(length):
                t = 1.0 if length == 1 else k / (length - 1)
                prefix = f"{lead.layout.main.prefix}{start + k}."
                for name in self._in_order(lead, [n for n in lead.tensors if n.startswith(prefix)]):
                    suffix = name.removeprefix(prefix)
                    mine, info = spelling.get(suffix, suffix), lead.tensors[name]
                    if info.shape not in shapes.get(mine, {info.shape}):
                        raise IncompatibleError(
                            f"cannot stack {name} of {lead.reference} ({info}) among the layers of {donor.reference}, "
                            f"where its shape is {' or '.join(str(list(shape)) for shape in sorted(shapes[mine]))}"
                        )
                    output = f"{donor.layout.main.prefix}{len(layers)}.{mine}"
                    depth = len(layers) / max(total - 1, 1)
                    self._add(output, name, t, inputs, base, scope, path, offset=k, suffix=suffix, depth=depth)
                layers.append((lead.config, start + k))
                for item in inputs:
                    self.layers_used.setdefault(item.model, set()).add(item.start + k)

    def _slice(self, i: int, output: OutputSliceDefinition, donor: Model) -> Any:
        path = (*self.path, "slices", i)
        base = self.models.base if output.base_model is None else self.models.position(output.base_model)
        lengths = []
        for j, source in enumerate(output.sources):
            position = self.models.position(source.model)
            model = self.models[position]
            start, end = source.layer_range
            if model.layout.main is None:
                raise IncompatibleError(f"{model.reference}: no numbered layers found, so it can't be sliced")
            if end > model.layout.main.count:
                count = model.layout.main.count
                raise self.recipe.fault(
                    f"layer_range [{start}, {end}) is beyond {model.reference}, with {count} layers; its last number, "
                    f"one past the last layer, is {count} at most",
                    *path, "sources", j, "layer_range",
                )  # fmt: skip
            lengths.append(end - start)
            if lengths[j] != lengths[0]:
                raise self.recipe.fault(
                    f"this source has {lengths[j]} layers, but the first one of the slice has {lengths[0]}",
                    *path, "sources", j, "layer_range",
                )  # fmt: skip
        positions = [self.models.position(s.model) for s in output.sources]
        lead = self.models[base if base in positions else positions[0]]
        inputs = [
            self._input(p, s.layer_range[0], s.parameters or {}, lead)
            for p, s in zip(positions, output.sources, strict=True)
        ]
        return inputs, base if base in positions else None, output.parameters or {}, path, lengths[0], lead

    def _input(self, position: int, start: int, own: Mapping[str, Any], lead: Model) -> _Input:
        model = self.models[position]
        if model is lead:
            return _Input(position, start, own, {}, {})
        suffixes = align(self._layer_shapes(lead), self._layer_shapes(model))
        return _Input(position, start, own, align(lead.tensors, model.tensors), suffixes)

    def _layer_shapes(self, model: Model) -> dict[str, set[tuple[int, ...]]]:
        """The shapes that tensors have in the layers of the main stack, by the rest of their names."""
        if model.reference not in self._shapes:
            found: dict[str, set[tuple[int, ...]]] = {}
            for name, info in model.tensors.items():
                if self._in_main(model, name):
                    found.setdefault(model.layout.place(name).suffix, set()).add(info.shape)
            self._shapes[model.reference] = found
        return self._shapes[model.reference]

    def _same_depth(self, donor: Model, model: Model, path: tuple[str | int, ...]) -> None:
        mine, theirs = model.layout.main, donor.layout.main
        if mine is not None and theirs is not None and mine.count != theirs.count:
            raise IncompatibleError(
                f"{self.recipe.text.place(path)}: {model.reference} has {mine.count} layers, but {donor.reference} has "
                f"{theirs.count}; use 'slices' to choose layers of each"
            )

    @staticmethod
    def _in_main(model: Model, name: str) -> bool:
        return model.layout.main is not None and model.layout.place(name).stack == model.layout.main.prefix

    def _outside(self, model: Model, name: str) -> bool:
        """Whether slices leave ``name`` as it is: neither in the main layers nor in a layer stored past them."""
        return not self._in_main(model, name) and not model.layout.is_extra(name)

    @staticmethod
    def _in_order(model: Model, names: Any) -> list[str]:
        """Embeddings first, then layers by number, then the rest; each in file order."""

        def key(name: str) -> tuple[int, str, int]:
            place = model.layout.place(name)
            if place.stack is None:
                return (0 if model.layout.role(name) == "first" else 2, "", 0)
            return (1, place.stack, place.index)

        return sorted(names, key=key)

    def _add(
        self,
        output: str,
        name: str,
        t: float,
        inputs: Sequence[_Input],
        base: int | None,
        scope: Mapping[str, Any],
        path: tuple[str | int, ...],
        *,
        offset: int | None = None,
        suffix: str = "",
        depth: float | None = None,
    ) -> None:
        """Add the output tensor that the lead calls ``name`` (layer ``offset`` of the slice, if given)."""
        contributions = []
        for item in inputs:
            model = self.models[item.model]
            if offset is None:
                theirs = item.names.get(name, name)
            else:
                assert model.layout.main is not None
                theirs = f"{model.layout.main.prefix}{item.start + offset}.{item.suffixes.get(suffix, suffix)}"
            contributions.append(self._contribution(item, model, theirs))
        known = [c.info for c in contributions if c.info is not None]
        copy = bool(known) and is_derived_buffer(name, known[0].shape)
        self.used.update((c.model, c.info.name) for c in contributions if c.info is not None)
        place = t if depth is None else depth
        self.slots.append(Slot(output, t, tuple(contributions), base, scope, self.outer, path, copy, place))

    @staticmethod
    def _contribution(item: _Input, model: Model, name: str) -> Contribution:
        info, tied = model.tensors.get(name), False
        if is_head(name) and model.head is None and model.embedding is not None:
            # A stored copy of a tied head is what the model computes with only if it equals the embedding; it does.
            info, tied = info or model.tensors[model.embedding], True
        return Contribution(item.model, name, info, item.own, tied)

    def _add_missing_head(
        self,
        donor: Model,
        inputs: Sequence[_Input],
        base: int | None,
        scope: Mapping[str, Any],
        path: tuple[str | int, ...],
    ) -> None:
        """Add the head that the lead does not store, because it is tied there, but that the output needs.

        That is so if another input has a head of its own, or if the donor's config promises one.
        """
        if any(is_head(slot.name) for slot in self.slots) or has_no_head(donor.config):
            return
        heads = [self.models[i.model].head for i in inputs]
        name = next((head for head in heads if head is not None), None)
        if name is None and is_tied(donor.config) is False:
            name = donor.head
        if name is not None:
            self._add(name, name, 0.0, inputs, base if base in [i.model for i in inputs] else None, scope, path)

    def _left_out(self, *, sliced: bool) -> tuple[tuple[int, str, str], ...]:
        """Every tensor that goes nowhere: its model, its name, and why."""
        given = {core(slot.name) for slot in self.slots}
        return tuple(
            (
                position,
                name,
                self._slice_reason(position, name, given) if sliced else self._whole_reason(position, name),
            )
            for position in range(len(self.models.models))
            for name in self.models[position].tensors
            if (position, name) not in self.used
        )

    def _whole_reason(self, position: int, name: str) -> str:
        if is_derived_buffer(name, self.models[position].tensors[name].shape):
            return "a buffer that the config determines"
        return f"{self.models[self.models.donor].reference.short} has no such tensor"

    def _slice_reason(self, position: int, name: str, given: Collection[str]) -> str:
        model = self.models[position]
        is_layer = self._in_main(model, name)
        layers = self.layers_used.get(position, ())
        if not layers or (is_layer and model.layout.place(name).index not in layers):
            return "outside the slices"
        if model.layout.is_extra(name):
            return "it belongs to a layer past the model's last"
        if is_derived_buffer(name, model.tensors[name].shape):
            return "a buffer that the config determines"
        if not is_layer and core(name) in given:
            return "another slice gives this tensor"
        return "the model that it is merged with has no such tensor"
