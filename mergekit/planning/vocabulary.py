"""The output's vocabulary: whose tokenizer it has, how many rows, and which rows of each model belong to its ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergekit.checkpoint import TensorInfo
from mergekit.errors import IncompatibleError, MergekitError, RecipeError, nearest, some_of
from mergekit.families.config import vocab_size
from mergekit.planning.expression import Leaf, Rows, RowTable, Split
from mergekit.planning.leaf import leaf_of
from mergekit.planning.models import Models
from mergekit.planning.slots import Contribution
from mergekit.recipe import Recipe
from mergekit.refs import ModelReference
from mergekit.vocab.maps import token_map, untold
from mergekit.vocab.union import unite, with_tokens
from mergekit.vocab.vocabulary import Vocabulary, read_vocabulary

__all__ = ["Alignment", "align_vocabularies", "other_meanings"]

_NAMED = 5
"""How many tokens a message names."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the recipe says of one token: output row ``row`` is row ``place`` of model ``model``, or zero (None).

    ``place`` None: the row that the token has there. ``force``: for models that have the token, too.
    """

    token: str
    row: int
    model: int | None
    place: int | None
    force: bool


@dataclass(frozen=True, eq=False)
class Alignment:
    """The vocabulary of the output, and how the models' embeddings are brought into its order.

    ``owner`` is the position of the model whose tokenizer files, special tokens and padding rows are taken. ``rows`` is
    the number of embedding rows of the output. ``maps`` holds for each model the row of each output row, -1 where it
    has none; int64 [models, rows].
    """

    models: Models
    owner: int
    output: Vocabulary
    own: tuple[Vocabulary, ...]
    rows: int
    maps: np.ndarray
    entries: tuple[_Entry, ...]
    warnings: list[str] = field(default_factory=list)

    @property
    def is_new(self) -> bool:
        """Whether the output's tokenizer is none of the models'."""
        return self.output is not self.own[self.owner]

    def leaves(self, name: str, present: Sequence[Contribution]) -> list[Leaf]:
        """The inputs of an output tensor with a vocabulary axis, aligned: one for each contribution, in order.

        A row that a model lacks is that of the base, if the base has it, else the mean of those that have it. One that
        no model has is the mean of all other rows.
        """
        infos = [c.info for c in present if c.info is not None]
        self._check_shapes(name, infos)
        maps = self.maps[[c.model for c in present]]
        for own, info in zip(maps, infos, strict=True):
            own[own >= info.shape[0]] = -1
        has = maps >= 0
        absent = np.logical_not(has.any(axis=0))
        self._tell_absent(name, absent)
        base = next((i for i, c in enumerate(present) if c.model == self.models.donor), None)
        reads = [leaf_of(self.models, c.model, info.name) for c, info in zip(present, infos, strict=True)]
        found: list[Leaf] = []
        for i, own in enumerate(maps):
            table = np.full(maps.shape, -1, np.int64)
            table[i] = own
            lacking = ~has[i]
            if base is not None:
                table[base, lacking & has[base]] = maps[base, lacking & has[base]]
                lacking &= ~has[base]
            table[:, lacking] = maps[:, lacking]
            table[i, absent] = RowTable.MEAN
            for entry in self.entries:
                self._apply(entry, name, table, i, present, infos, has)
            found.append(_leaf(reads, infos, i, table))
        return found

    def _apply(
        self,
        entry: _Entry,
        name: str,
        table: np.ndarray,
        i: int,
        present: Sequence[Contribution],
        infos: Sequence[TensorInfo],
        has: np.ndarray,
    ) -> None:
        """Put what the recipe says of a token into the table of input ``i``."""
        if has[i, entry.row] and not entry.force:
            return
        table[:, entry.row] = -1
        if entry.model is None:
            return
        source = next((j for j, c in enumerate(present) if c.model == entry.model), None)
        whose = self.models[entry.model].reference
        if source is None:
            raise IncompatibleError(f"token {entry.token!r}: {whose} has no part in {name}, so it can't give its row")
        place = int(self.maps[entry.model, entry.row]) if entry.place is None else entry.place
        if not 0 <= place < infos[source].shape[0]:
            raise IncompatibleError(
                f"token {entry.token!r}: {whose} has no row for it in {name} ({infos[source].shape[0]} rows)"
            )
        table[source, entry.row] = place

    def _check_shapes(self, name: str, infos: Sequence[TensorInfo]) -> None:
        if len({info.shape[1:] for info in infos}) != 1 or any(not info.shape or not info.shape[0] for info in infos):
            shapes = " and ".join(dict.fromkeys(str(list(info.shape)) for info in infos))
            raise IncompatibleError(
                f"cannot merge {name}: shapes {shapes} differ by more than the vocabulary; merge models that were "
                "fine-tuned from the same base"
            )

    def _tell_absent(self, name: str, absent: Any) -> None:
        known = self.output.by_id
        named = {entry.row for entry in self.entries}
        tokens = [known[row] for row in np.flatnonzero(absent).tolist() if row in known and row not in named]
        if tokens:
            self._warn(f"no model that takes part in {name} has a row for {_listed(tokens)}; the mean of all is taken")

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def _leaf(reads: Sequence[Leaf], infos: Sequence[TensorInfo], i: int, table: np.ndarray) -> Leaf:
    """Input ``i`` as its table says: itself where nothing changes, a prefix of it, or rows gathered, its own first."""
    used = [i, *(j for j, column in enumerate(table) if j != i and (column != -1).any())]
    rows = table.shape[1]
    if used == [i] and np.array_equal(table[i], np.arange(rows)):
        return reads[i] if infos[i].shape[0] == rows else Split(reads[i], 0, rows)
    return Rows(tuple(reads[j] for j in used), RowTable.of(table[used]))


def _listed(tokens: Sequence[str]) -> str:
    return some_of(list(map(repr, tokens)), _NAMED, "tokens")


def align_vocabularies(recipe: Recipe, models: Models) -> Alignment | None:
    """The alignment that a recipe asks for; None if it says nothing of tokenizers."""
    config = recipe.config
    if config.tokenizer is None and config.tokenizer_source is None:
        return None
    path = ("tokenizer_source",) if config.tokenizer is None else ("tokenizer", "source")
    source = config.tokenizer_source if config.tokenizer is None else config.tokenizer.source
    owner = _owner(recipe, models, source, path)
    own = _read_all(models)
    limits = [_rows(models, position) for position in range(len(own))]
    output = own[owner]
    warnings: list[str] = []
    try:
        if source == "union":
            order = [owner, *(p for p in range(len(own)) if p != owner)]
            output, warnings = unite([own[p] for p in order], [limits[p] for p in order])
        wanted = config.tokenizer.tokens or {} if config.tokenizer else {}
        output = with_tokens(output, wanted)
    except IncompatibleError as error:
        raise recipe.fault(str(error), *path) from None
    padding = max(limits[owner] or 0, output.size)
    multiple = (config.tokenizer.pad_to_multiple_of if config.tokenizer else None) or 1
    rows = -(-padding // multiple) * multiple
    maps = _maps(output, own, limits, owner, rows)
    alignment = Alignment(models, owner, output, own, rows, maps, (), warnings)
    entries = tuple(_entry(recipe, alignment, token) for token in wanted)
    return Alignment(models, owner, output, own, rows, maps, entries, warnings)


def _read_all(models: Models) -> tuple[Vocabulary, ...]:
    """The vocabulary of every model; models with the same file share one object."""
    found: dict[bytes, Vocabulary] = {}
    result = []
    for position, model in enumerate(models.models):
        folder = models.tokenizer_of(position)[1]
        path = folder / "tokenizer.json"
        key = path.read_bytes() if path.is_file() else os.fsencode(folder)
        if key not in found:
            found[key] = read_vocabulary(folder, model.reference.short)
        result.append(found[key])
    return tuple(result)


def other_meanings(models: Models) -> list[str]:
    """Warnings about models whose tokenizers give other ids to tokens than the donor's, though nothing aligns them."""
    folders = [models.tokenizer_of(position)[1] for position in range(len(models.models))]
    contents = [path.read_bytes() if (path := f / "tokenizer.json").is_file() else None for f in folders]
    mine = contents[models.donor]
    if mine is None or all(theirs in (None, mine) for theirs in contents):
        return []
    warnings = []
    for model, folder, theirs in zip(models.models, folders, contents, strict=True):
        if theirs in (None, mine):
            continue
        try:
            donor = read_vocabulary(folders[models.donor], models[models.donor].reference.short)
            by_id = read_vocabulary(folder, model.reference.short).by_id
        except MergekitError as error:
            warnings.append(f"the tokenizers can't be compared: {error}")
            continue
        unlike = [token for token, number in donor.ids.items() if by_id.get(number, token) != token]
        if unlike:
            warnings.append(
                f"{len(unlike):,} ids are other tokens in {model.reference.short} than in {donor.name} (such as "
                f"{_listed(unlike[:2])}), so rows of different tokens are merged; 'tokenizer_source: union' or "
                "'base' brings them together"
            )
    return warnings


def _owner(recipe: Recipe, models: Models, source: Any, path: tuple[str, ...]) -> int:
    """The position of the model whose tokenizer the output starts from."""
    if source in ("base", "union"):
        return models.donor
    return _position(recipe, models, source, path, ["base", "union"])


def _position(recipe: Recipe, models: Models, value: Any, path: Sequence[str], words: Sequence[str] = ()) -> int:
    """The position of a model that the recipe names as a source of a tokenizer or a token."""
    text = value.removeprefix("model:") if isinstance(value, str) else value
    known = [model.reference for model in models.models]
    try:
        reference = ModelReference.model_validate(text)
    except RecipeError as error:
        raise recipe.fault(str(error), *path) from None
    if reference in known:
        return known.index(reference)
    hint = nearest(str(reference), [*words, *map(str, known)])
    kind = "a tokenizer source, nor a model that this recipe names so" if words else "a model that this recipe names so"
    raise recipe.fault(f"'{reference}' is not {kind}. {hint}", *path)


def _rows(models: Models, position: int) -> int | None:
    """How many rows the embeddings of a model have."""
    model = models[position]
    if model.embedding is not None:
        return model.tensors[model.embedding].shape[0]
    return vocab_size(model.config)


def _maps(
    output: Vocabulary, own: Sequence[Vocabulary], limits: Sequence[int | None], owner: int, rows: int
) -> np.ndarray:
    """Which row of each model belongs to each row of the output, int64 [models, rows].

    Rows of the owner without a token (padding) belong to the same rows of other models, if they have no token there.
    """
    maps = np.full((len(own), rows), -1, np.int64)
    shared: dict[int, np.ndarray] = {}
    free = untold(output, rows)
    free[min(limits[owner] or 0, rows) :] = False
    numbers = np.arange(rows)
    for mine, vocabulary, limit in zip(maps, own, limits, strict=True):
        if id(vocabulary) not in shared:
            shared[id(vocabulary)] = token_map(output, vocabulary)
        mine[: output.size] = shared[id(vocabulary)]
        padding = free & untold(vocabulary, rows)
        mine[padding] = numbers[padding]
        if limit is not None:
            mine[mine >= limit] = -1
    return maps


def _entry(recipe: Recipe, alignment: Alignment, token: str) -> _Entry:
    """What the recipe says of ``token``, checked."""
    assert recipe.config.tokenizer is not None
    given = (recipe.config.tokenizer.tokens or {})[token]
    path = ("tokenizer", "tokens", token)
    if not token:
        raise recipe.fault("a token has at least one character", *path)
    row, source = alignment.output.ids[token], given.source
    if source is None:
        if given.force or (alignment.maps[:, row] < 0).any():
            raise recipe.fault(f"token {token!r} needs a 'source': not every model has it", *path)
        return _Entry(token, row, None, None, False)
    if isinstance(source, dict) and "kind" in source:
        return _of_kind(recipe, alignment, token, row, source, given.force)
    position = _position(recipe, alignment.models, source, (*path, "source"))
    if alignment.maps[position, row] < 0:
        raise recipe.fault(
            f"{alignment.models[position].reference} has no token {token!r}; name one that it has, with "
            "'kind: model_token'",
            *path,
            "source",
        )
    return _Entry(token, row, position, None, given.force)


def _of_kind(recipe: Recipe, alignment: Alignment, token: str, row: int, source: dict[str, Any], force: bool) -> _Entry:
    path = ("tokenizer", "tokens", token, "source")
    kind = source["kind"]
    allowed = {"zero": {"kind"}, "model_token": {"kind", "model", "token", "token_id"}}
    if not isinstance(kind, str) or kind not in allowed:
        raise recipe.fault(f"'{kind}' is no kind of token source. {nearest(str(kind), allowed)}", *path, "kind")
    unknown = sorted(set(source) - allowed[kind])
    if unknown:
        raise recipe.fault(f"there is no '{unknown[0]}' here. {nearest(unknown[0], allowed[kind])}", *path, unknown[0])
    if kind == "zero":
        return _Entry(token, row, None, None, force)
    if "model" not in source:
        raise recipe.fault("a source of kind 'model_token' needs a 'model'", *path)
    position = _position(recipe, alignment.models, source["model"], (*path, "model"))
    name, number = source.get("token"), source.get("token_id")
    if (name is None) == (number is None):
        raise recipe.fault("give exactly one of 'token' and 'token_id'", *path)
    whose, limit = alignment.models[position].reference, _rows(alignment.models, position)
    if number is not None:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < (limit or 0):
            raise recipe.fault(
                f"token_id {number} is outside the embeddings of {whose}, which have {limit} rows", *path, "token_id"
            )
        return _Entry(token, row, position, number, force)
    known = alignment.own[position].ids
    if not isinstance(name, str) or name not in known:
        raise recipe.fault(f"{whose} has no token {name!r}", *path, "token")
    return _Entry(token, row, position, known[name], force)
