"""One tokenizer with the tokens of several: ids of the first stay, those of the others follow in order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit.errors import IncompatibleError
from mergekit.vocab.alphabet import as_bytes
from mergekit.vocab.alphabet import as_text as spelling
from mergekit.vocab.vocabulary import SETTINGS, Vocabulary, pairs

__all__ = ["unite", "with_tokens"]

_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
_RULES = ("normalizer", "pre_tokenizer")
_FLAGS = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges", "fuse_unk")


def unite(vocabularies: Sequence[Vocabulary], rows: Sequence[int | None]) -> tuple[Vocabulary, list[str]]:
    """The union of tokenizers, and warnings.

    The first one's tokens keep their ids; tokens that it lacks get the next ids, in the order of ``vocabularies`` and
    of their ids there. ``rows`` are the numbers of embedding rows: ids at or beyond them count as missing, but the
    first tokenizer stays as it is. If nothing is missing, the result is the first vocabulary itself.

    Tokenizers of one kind and alphabet are joined: ordinary tokens stay ordinary, and merges of BPE follow those of the
    first. Where two BPE tokenizers split a text alike, so does the union (unless whole words are taken at once,
    ``ignore_merges``); elsewhere merges of the first come first. Of another alphabet (byte-level and SentencePiece)
    tokens that spell the same text count as the same, and others become added tokens, which are found in text before
    anything is split; that is done last. IncompatibleError for what has no union.
    """
    builder = _Builder(vocabularies[0])
    others = list(zip(vocabularies[1:], rows[1:], strict=True))
    # What is joined first is there when others are asked what they spell that nobody does.
    for other, limit in sorted(others, key=lambda pair: not builder.is_like(pair[0])):
        builder.take(other, other.size if limit is None else limit)
    return builder.result(), builder.warnings


def with_tokens(vocabulary: Vocabulary, contents: Iterable[str]) -> Vocabulary:
    """``vocabulary`` and, appended as added tokens, those of ``contents`` that it lacks."""
    builder = _Builder(vocabulary)
    for content in contents:
        if content not in vocabulary.ids:
            builder.add(content, _PLAIN, vocabulary.name)
    return builder.result()


class _Builder:
    """A vocabulary that grows."""

    def __init__(self, first: Vocabulary) -> None:
        self.first = first
        self.ids = dict(first.ids)
        self.added: dict[str, Mapping[str, Any]] = dict(first.added)
        self.ordinary: dict[str, int] = {}
        self.scores: dict[str, float] = {}
        self.merges: dict[tuple[str, str], None] = {}
        self.warnings: list[str] = []
        self._next = first.size
        self._known: dict[tuple[str, str], None] | None = None
        self._spelt: dict[bytes, int] | None = None

    def is_like(self, other: Vocabulary) -> bool:
        """Whether tokens of ``other`` can be ordinary ones here."""
        return self.first.kind == other.kind and self.first.alphabet == other.alphabet

    def take(self, other: Vocabulary, rows: int) -> None:
        """Add what ``other`` has more, of the ids below ``rows``."""
        mine = self.first
        if not self.is_like(other) and "words" in (mine.alphabet, other.alphabet):
            raise IncompatibleError(
                f"the tokenizers of {mine.name} ({mine.kind}) and {other.name} ({other.kind}) have no union: WordPiece "
                f"joins only WordPiece; choose one of the two, for example 'tokenizer_source: {mine.name}'"
            )
        tokens = sorted(((t, i) for t, i in other.ids.items() if i < rows), key=lambda item: item[1])
        if self.is_like(other):
            self._join(other, [token for token, _ in tokens])
        else:
            self._append(other, [token for token, _ in tokens])

    def add(self, content: str, entry: Mapping[str, Any], name: str) -> None:
        """Add an added token, or see that one that is there is the same."""
        before = self.added.get(content)
        if before is None:
            number = self.ids.get(content)
            self.added[content] = {**{key: bool(entry.get(key)) for key in SETTINGS}, "id": self._give(content)}
            if number is not None:
                self.warnings.append(f"{content!r} is an added token of {name}, so it is one here, too")
            return
        unlike = [key for key in SETTINGS if bool(before.get(key)) != bool(entry.get(key))]
        if unlike:
            what = ", ".join(f"{key} is {str(bool(before.get(key))).lower()}" for key in unlike)
            self.warnings.append(
                f"the added token {content!r} is set up otherwise by {name}; as in {self.first.name}, {what}"
            )

    def _give(self, token: str) -> int:
        if token not in self.ids:
            self.ids[token] = self._next
            self._next += 1
        return self.ids[token]

    def _join(self, other: Vocabulary, tokens: Sequence[str]) -> None:
        """Take over tokens of a tokenizer of the same kind as ordinary ones."""
        count = len(self.ordinary)
        scores = dict(map(tuple, other.record["model"]["vocab"])) if other.kind == "Unigram" else {}
        for token in tokens:
            if token in other.added:
                self.add(token, other.added[token], other.name)
            elif token not in self.ids:
                self.ordinary[token] = self._give(token)
                self.scores[token] = scores.get(token, 0.0)
        merges = self._join_merges(other, dict.fromkeys(tokens)) if other.kind == "BPE" else 0
        fresh = len(self.ordinary) - count
        if fresh or merges:
            text = f"{fresh:,} tokens" + (f" and {merges:,} merges" if other.kind == "BPE" else "")
            self.warnings.append(
                f"{other.name} brings {text} of its own: where text could be split in both ways, it may be split "
                f"otherwise than {self.first.name} or {other.name} did"
            )
        unlike = [rule for rule in _RULES if self.first.record.get(rule) != other.record.get(rule)]
        mine, theirs = self.first.record["model"], other.record["model"]
        unlike += [flag for flag in _FLAGS if mine.get(flag) != theirs.get(flag)]
        if unlike:
            self.warnings.append(
                f"the tokenizers of {self.first.name} and {other.name} differ in {', '.join(unlike)}; as in "
                f"{self.first.name} here, so {other.name}'s text may be split otherwise than before"
            )

    def _join_merges(self, other: Vocabulary, tokens: Mapping[str, None]) -> int:
        """Put the merges that are missing behind those that are there; how many they are."""
        if self._known is None:
            self._known = dict.fromkeys(pairs(self.first.record["model"]["merges"]))
        prefix = len(other.record["model"].get("continuing_subword_prefix") or "")
        fresh = [
            pair
            for pair in pairs(other.record["model"]["merges"])
            if pair not in self._known
            and pair[0] in tokens
            and pair[1] in tokens
            and pair[0] + pair[1][prefix:] in tokens
        ]
        self._known.update(dict.fromkeys(fresh))
        self.merges.update(dict.fromkeys(fresh))
        return len(fresh)

    def _append(self, other: Vocabulary, tokens: Sequence[str]) -> None:
        """Take over tokens that spell what none here does as added tokens."""
        if self._spelt is None:
            joined = {as_bytes(token, self.first.alphabet): number for token, number in self.ordinary.items()}
            self._spelt = {**joined, **self.first.by_bytes}
        fresh = lost = 0
        for token in tokens:
            entry = other.added.get(token)
            if entry is not None and (entry.get("special") or token in self.added):
                self.add(token, entry, other.name)
                continue
            spelt = as_bytes(token, other.alphabet) if entry is None else spelling(token, other.alphabet)
            if spelt in self._spelt or not spelt:
                continue
            try:
                text = spelt.decode("utf-8")
            except UnicodeDecodeError:
                lost += 1  # a part of a letter: the bytes are there, the token is not
                continue
            if text not in self.ids:
                self.add(text, _PLAIN, other.name)
                fresh += 1
            self._spelt[spelt] = self.ids[text]
        if fresh or lost:
            self.warnings.append(
                f"the tokenizers of {self.first.name} ({self.first.kind}) and {other.name} ({other.kind}) spell text "
                f"in different ways: {fresh:,} tokens of {other.name} become added tokens, which are found in any "
                f"text before it is split, so {self.first.name}'s text may be split otherwise than before"
                + (f"; {lost:,} that are parts of letters are left out" if lost else "")
            )

    def result(self) -> Vocabulary:
        """The vocabulary as it is now."""
        first = self.first
        is_same = self.ids == first.ids and not self.merges and list(self.added) == list(first.added)
        if is_same:
            return first
        model = dict(first.record["model"])
        if first.kind == "Unigram":
            model["vocab"] = self._pieces(model["vocab"])
        else:
            model["vocab"] = {**model["vocab"], **self.ordinary, **self._places(model["vocab"])}
        if self.merges:
            model["merges"] = _written(model["merges"], self.merges)
        added = [
            {"id": entry["id"], "content": content, **{key: bool(entry.get(key)) for key in SETTINGS}}
            for content, entry in sorted(self.added.items(), key=lambda item: item[1]["id"])
        ]
        record = {**first.record, "added_tokens": added, "model": model}
        return Vocabulary(first.name, record, first.kind, self.ids, {entry["content"]: entry for entry in added})

    def _places(self, vocab: Iterable[str]) -> dict[str, int]:
        """The added tokens that the tokenizer's model has to know, so that they get their ids.

        The library gives an added token that the model does not know the next id after those that there are. If that
        makes the right ids, nothing has to be known; else all are.
        """
        known = {**dict.fromkeys(vocab), **dict.fromkeys(self.ordinary)}
        most = -1
        for content, entry in sorted(self.added.items(), key=lambda item: item[1]["id"]):
            given = entry["id"] if content in known else max(most + 1, len(known))
            if given != entry["id"]:
                return {content: entry["id"] for content, entry in self.added.items()}
            most = max(most, given)
        return {}

    def _pieces(self, pieces: Sequence[Any]) -> list[Any]:
        """The pieces of a Unigram tokenizer, whose place is their id."""
        if not self._places(piece for piece, _ in pieces):
            return list(pieces)
        lowest = min((score for _, score in pieces), default=0.0)  # nothing lower: what is unknown costs less than that
        by_id = {number: token for token, number in self.ids.items()}
        grown = list(pieces)
        for number in range(len(pieces), self._next):
            token = by_id.get(number)
            if token is None:
                raise IncompatibleError(
                    f"the tokenizer of {self.first.name} has no token with id {number}, and one of type Unigram can't "
                    "grow beyond a hole; choose another 'tokenizer_source'"
                )
            grown.append([token, self.scores.get(token, lowest)])
        return grown


def _written(merges: Sequence[Any], more: Iterable[tuple[str, str]]) -> list[Any]:
    """``merges`` and ``more`` in one list, in the way that the first are written, if that can hold them."""
    if all(isinstance(merge, str) for merge in merges) and not any(" " in a or " " in b for a, b in more):
        return [*merges, *(f"{a} {b}" for a, b in more)]
    return [list(pair) for pair in (*pairs(merges), *more)]


def as_text(vocabulary: Vocabulary) -> str:
    """The tokenizer.json of a vocabulary."""
    # Not indented: with that, Python's encoder takes twenty times as long.
    return json.dumps(vocabulary.record, ensure_ascii=False) + "\n"
