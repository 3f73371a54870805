"""The tokens of one tokenizer, read from ``tokenizer.json`` and held to be consistent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from mergekit.checkpoint import read_json
from mergekit.errors import CheckpointError, IncompatibleError
from mergekit.vocab.alphabet import Alphabet, alphabet_of, as_bytes

__all__ = ["Vocabulary", "read_vocabulary", "vocabulary_of"]

_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_MOST_IDS = 1 << 24
_SLOW = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json", "tekken.json")
SETTINGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""How an added token is found in text."""


@dataclass(frozen=True, eq=False)  # no slots: some properties are computed once
class Vocabulary:
    """A tokenizer as data. ``name`` is that of its model, for messages.

    ``record`` is the whole of tokenizer.json, ``kind`` the type of its model. ``ids`` maps every token, ordinary and
    added, to its id; no two tokens share one. ``added`` are the added tokens' entries by content, in order of id.
    """

    name: str
    record: Mapping[str, Any]
    kind: str
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    @cached_property
    def alphabet(self) -> Alphabet:
        """How ordinary tokens spell text."""
        return alphabet_of(self.record)

    @cached_property
    def by_id(self) -> Mapping[int, str]:
        """The token of each id."""
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def by_bytes(self) -> Mapping[bytes, int]:
        """The id of each ordinary token by the text that it spells; of several, the lowest."""
        found: dict[bytes, int] = {}
        for token, number in sorted(self.ids.items(), key=lambda item: item[1]):
            if token not in self.added:
                found.setdefault(as_bytes(token, self.alphabet), number)
        return found


def read_vocabulary(folder: Path, name: str) -> Vocabulary:
    """The vocabulary of the tokenizer in ``folder``, which belongs to the model called ``name``.

    IncompatibleError if there is no ``tokenizer.json``, CheckpointError if it contradicts itself.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        return vocabulary_of(read_json(path), name, str(path))
    slow = next((file for file in _SLOW if (folder / file).is_file()), None)
    if slow is None:
        raise IncompatibleError(f"{name} has no tokenizer (no tokenizer.json in {folder}), which its vocabulary needs")
    raise IncompatibleError(
        f"{name} has only a slow tokenizer ({slow}); write its tokenizer.json once, with transformers: "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def vocabulary_of(record: Mapping[str, Any], name: str, place: str) -> Vocabulary:
    """The vocabulary that a tokenizer.json describes; ``place`` is where it was found."""
    model = record.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{place}: no 'model'; this is no tokenizer, or one of an unknown format")
    kind = model.get("type") or next((k for k in ("BPE",) if "merges" in model), "WordLevel")
    if kind not in _KINDS:
        raise CheckpointError(f"{place}: a tokenizer of type '{kind!s:.40}' is not known here")
    ids = _ordinary(model, kind, place)
    added = _added(record.get("added_tokens"), ids, place)
    for content, entry in added.items():
        known = ids.setdefault(content, entry["id"])
        if known != entry["id"]:
            raise CheckpointError(
                f"{place}: the added token {content!r} has id {entry['id']}, but the vocabulary gives it {known}"
            )
    _no_twins(ids, place)
    return Vocabulary(name, record, kind, ids, added)


def _ordinary(model: Mapping[str, Any], kind: str, place: str) -> dict[str, int]:
    """The ordinary tokens and their ids."""
    vocab = model.get("vocab")
    if kind == "Unigram":
        if not isinstance(vocab, list) or not all(_is_piece(piece) for piece in vocab):
            raise CheckpointError(f"{place}: 'vocab' is not a list of pieces and scores")
        # Of a piece that is listed twice the tokenizer uses the last; the others' ids have no token.
        return {piece[0]: number for number, piece in enumerate(vocab)}
    if not isinstance(vocab, dict) or not all(_is_id(number) for number in vocab.values()):
        raise CheckpointError(f"{place}: 'vocab' does not map tokens to ids")
    if kind == "BPE":
        _check_merges(model.get("merges"), vocab, place)
    return dict(vocab)


def _check_merges(merges: Any, vocab: Mapping[str, int], place: str) -> None:
    if not isinstance(merges, list):
        raise CheckpointError(f"{place}: 'merges' is not a list")
    found = pairs(merges, place)
    if vocab.keys() >= set(chain.from_iterable(found)):
        return
    a, b = next(pair for pair in found if pair[0] not in vocab or pair[1] not in vocab)
    raise CheckpointError(f"{place}: the merge of {a!r:.40} and {b!r:.40} is not in the vocabulary")


def pairs(merges: Sequence[Any], place: str = "tokenizer.json") -> list[tuple[str, str]]:
    """The merges of a BPE tokenizer, whichever of the two ways they are written in."""
    # Without a loop of our own: there may be hundreds of thousands.
    if set(map(type, merges)) <= {str}:
        found = [tuple(merge.split(" ")) for merge in merges]
    else:
        found = [tuple(m.split(" ") if isinstance(m, str) else m if isinstance(m, list) else ()) for m in merges]
    if not set(map(len, found)) <= {2}:
        odd = next(merge for merge, pair in zip(merges, found, strict=True) if len(pair) != 2)
        raise CheckpointError(f"{place}: {odd!r:.60} is not a merge of two tokens")
    if not set(map(type, chain.from_iterable(found))) <= {str}:
        raise CheckpointError(f"{place}: 'merges' holds something that is no text")
    return found


def _added(entries: Any, ids: Mapping[str, int], place: str) -> dict[str, Mapping[str, Any]]:
    """The added tokens by content, in order of id."""
    if entries is None:
        return {}
    if not isinstance(entries, list):
        raise CheckpointError(f"{place}: 'added_tokens' is not a list")
    found: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not _is_id(entry.get("id")):
            raise CheckpointError(f"{place}: {entry!r:.60} is not an added token")
        before = found.setdefault(entry["content"], entry)
        if before["id"] != entry["id"]:
            raise CheckpointError(
                f"{place}: the added token {entry['content']!r} has two ids, {before['id']} and {entry['id']}"
            )
    return dict(sorted(found.items(), key=lambda item: item[1]["id"]))


def _no_twins(ids: Mapping[str, int], place: str) -> None:
    if len(set(ids.values())) == len(ids):
        return
    seen: dict[int, str] = {}
    for token, number in ids.items():
        if number in seen:
            raise CheckpointError(f"{place}: {seen[number]!r:.40} and {token!r:.40} both have id {number}")
        seen[number] = token


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_IDS


def _is_piece(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], (int, float))
        and not isinstance(value[1], bool)
    )
