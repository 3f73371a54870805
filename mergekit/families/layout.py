"""What a model's tensors are, inferred from their names: layer stacks, embeddings, heads, derived buffers.

A name such as ``model.layers.3.mlp.experts.0.w1.weight`` belongs to layer 3 of the stack ``model.layers``: the first
number in a name that stands alone counts, later ones (experts) are part of the template. A stack is a prefix whose
numbers run 0, 1, 2, ... without holes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.families.config import layer_count

__all__ = [
    "Layout",
    "Place",
    "Stack",
    "infer_layout",
    "is_derived_buffer",
    "is_embedding",
    "is_head",
    "is_per_token",
    "numbers_out",
]

_NUMBERED = re.compile(r"^(?P<prefix>(?:.*?\.)?)(?P<index>\d+)\.(?P<suffix>.+)$")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings?|tok_embeddings|tokens_embed|input_embedding|embeddings?|shared)\.weight$"
)
_HEAD = re.compile(
    r"((^|\.)(lm_head|embed_out|output|output_layer|output_projection|lm_head\.(linear|decoder|out_proj)|generator_lm_head"
    r"|lm_loss|predictions\.decoder|vocab_projector|proj_out)|^(head|decoder|head\.decoder))\.weight$"
)
_DERIVED = re.compile(
    r"(\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.rotary_pos_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias"
    r"|(^|\.)embeddings\.(position_ids|token_type_ids))$"
)
_FIRST = re.compile(
    r"(?<!un)embed(?!_out|ding_norm)|wte|wpe|(^|\.)(shared|encoder|vision|visual|audio|multi_modal|patch|positional|relative_pe|rotary|conv\d)"
)
_PREFERRED = ("language_model", "text_model", "decoder", "model.layers", "transformer.h")


BEFORE, AFTER = "before", "after"
"""The rows of what stands outside the layers."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's place: layer ``index`` of ``stack`` (None outside stacks), and the rest of its name."""

    stack: str | None
    index: int
    suffix: str


@dataclass(frozen=True, slots=True)
class Stack:
    """A run of numbered layers: names are ``prefix + number + "." + suffix``."""

    prefix: str
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The structure of one model. ``main`` is the stack that recipes mean by layers, if one can be told."""

    stacks: Mapping[str, Stack]
    main: Stack | None

    def place(self, name: str) -> Place:
        """Where the tensor ``name`` belongs."""
        match = _NUMBERED.match(name)
        if match is None or match["prefix"] not in self.stacks:
            return Place(None, 0, name)
        index = int(match["index"])
        if index >= self.stacks[match["prefix"]].count:
            return Place(None, 0, name)
        return Place(match["prefix"], index, match["suffix"])

    def depth(self, name: str) -> float:
        """The depth t in [0, 1] at which gradients are read for ``name``: 0 outside layers, 1 in a lone layer."""
        place = self.place(name)
        if place.stack is None:
            return 0.0
        count = self.stacks[place.stack].count
        return 1.0 if count == 1 else place.index / (count - 1)

    def role(self, name: str) -> str:
        """``first`` for what stands before the main layers (embeddings), ``last`` for what stands after (norm, heads).

        The module that holds the main layers says nothing about its other tensors: ``encoder.`` of a BERT-like model.
        """
        parent = "" if self.main is None else self.main.prefix[:-1].rpartition(".")[0] + "."
        return "first" if _FIRST.search(name.removeprefix(parent)) and not is_head(name) else "last"

    def row(self, name: str) -> str:
        """Where ``name`` stands, for people: the number of its layer (of other stacks behind the prefix of the stack),
        else ``BEFORE`` or ``AFTER`` the layers.
        """
        place = self.place(name)
        if place.stack is None:
            return BEFORE if self.role(name) == "first" else AFTER
        return self._row(place.stack, place.index)

    @property
    def rows(self) -> tuple[str, ...]:
        """All rows in order: before the layers, the main layers, those of other stacks, after them."""
        main = self.main.prefix if self.main else None
        stacks = sorted(self.stacks.values(), key=lambda stack: stack.prefix != main)
        return (BEFORE, *(self._row(stack.prefix, index) for stack in stacks for index in range(stack.count)), AFTER)

    def _row(self, prefix: str, index: int) -> str:
        return str(index) if self.main is not None and prefix == self.main.prefix else f"{prefix}{index}"

    def is_extra(self, name: str) -> bool:
        """Whether ``name`` belongs to a layer stored past the last of the main stack (a head that predicts further)."""
        match = _NUMBERED.match(name)
        return (
            match is not None
            and self.main is not None
            and (match["prefix"] == self.main.prefix and int(match["index"]) >= self.main.count)
        )


def infer_layout(names: Iterable[str], config: Mapping[str, Any]) -> Layout:
    """Find the layer stacks among tensor ``names``; ``config`` says which of them is the main one.

    Layers beyond the number that the config gives (extra prediction heads stored as a last layer) don't belong to
    the stack.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        match = _NUMBERED.match(name)
        if match:
            numbers.setdefault(match["prefix"], set()).add(int(match["index"]))
    stacks = {prefix: Stack(prefix, len(found)) for prefix, found in numbers.items() if found == set(range(len(found)))}
    wanted = layer_count(config)
    main = _choose(list(stacks.values()), wanted)
    if main is not None and wanted is not None and main.count > wanted:
        main = Stack(main.prefix, wanted)
        stacks[main.prefix] = main
    return Layout(stacks, main)


def _choose(stacks: list[Stack], wanted: int | None) -> Stack | None:
    if wanted is not None:
        stacks = [s for s in stacks if s.count == wanted] or [s for s in stacks if wanted < s.count <= wanted + 4]
    if len(stacks) <= 1:
        return stacks[0] if stacks else None
    for mark in _PREFERRED:
        found = [s for s in stacks if mark in s.prefix]
        if len(found) == 1:
            return found[0]
    return max(stacks, key=lambda s: s.count) if wanted is None else stacks[0]


def numbers_out(name: str) -> str:
    """``name`` with ``{n}`` for each number that stands alone: what like tensors of all layers share.

    >>> numbers_out("model.layers.3.mlp.experts.0.w1.weight")
    'model.layers.{n}.mlp.experts.{n}.w1.weight'
    """
    return _NUMBER.sub("{n}", name)


def is_embedding(name: str) -> bool:
    """Whether ``name`` is the table of input embeddings, going by names used in practice."""
    return _EMBEDDING.search(name) is not None and "position" not in name and "token_type" not in name


def is_per_token(name: str) -> bool:
    """Whether ``name`` is a second table with a row for each token, beside the embeddings."""
    return name.endswith("embed_tokens_per_layer.weight")


def is_head(name: str) -> bool:
    """Whether ``name`` is the matrix that maps hidden states to vocabulary."""
    return _HEAD.search(name) is not None and _NUMBERED.match(name) is None


def is_derived_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor only caches what the config determines (masks, rotary frequencies, position numbers)."""
    if name.endswith((".attn.bias", ".attention.bias")):
        return len(shape) == 4
    return _DERIVED.search(name) is not None
