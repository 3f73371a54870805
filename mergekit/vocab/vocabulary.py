"""The tokens of one tokenizer, read from ``tokenizer.json`` and held to be consistent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from mergekit.checkpoint import read_json
from mergekit.errors import CheckpointError, IncompatibleError
from mergekit.vocab.alphabet import Alphabet, alphabet_of, as_bytes, as_text, is_byte

__all__ = ["Vocabulary", "read_vocabulary", "vocabulary_of"]

_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_MOST_IDS = 1 << 24
_MOST_HOLES = 100_000
_MOST_SCORE = 1e30
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
        """The id of each token by the text that it spells, special tokens left out; of several, the lowest.

        A piece that stands for a byte comes after all others: where a letter has a piece of its own, text has that.
        """
        found: dict[bytes, int] = {}
        ordered = sorted(self.ids.items(), key=lambda item: (is_byte(item[0], self.alphabet), item[1]))
        for token, number in ordered:
            entry = self.added.get(token)
            if entry is None:
                found.setdefault(as_bytes(token, self.alphabet), number)
            elif not entry.get("special"):
                found.setdefault(as_text(token, self.alphabet), number)
        return found


def read_vocabulary(folder: Path, name: str) -> Vocabulary:
    """The vocabulary of the tokenizer in ``folder``, which belongs to the model called ``name``.

    IncompatibleError if there is no ``tokenizer.json``, CheckpointError if it contradicts itself.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        return _completed(vocabulary_of(read_json(path), name, str(path)), folder)
    slow = next((file for file in _SLOW if (folder / file).is_file()), None)
    if slow is None:
        raise IncompatibleError(f"{name} has no tokenizer (no tokenizer.json in {folder}), which its vocabulary needs")
    raise IncompatibleError(
        f"{name} has only a slow tokenizer ({slow}); write its tokenizer.json once, with transformers: "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def _completed(found: Vocabulary, folder: Path) -> Vocabulary:
    """``found`` and the tokens that only the files beside tokenizer.json know, as older programs left them."""
    known = {number: token for token, number in found.ids.items()}
    extra: dict[str, Mapping[str, Any]] = {}
    for content, entry in _beside(folder):
        if _is_id(entry["id"]) and content not in found.ids and entry["id"] not in known:
            extra[content] = entry
            known[entry["id"]] = content
    if not extra:
        return found
    ids = {**found.ids, **{content: entry["id"] for content, entry in extra.items()}}
    _hold(ids, f"{folder}: the added tokens beside tokenizer.json")
    added = sorted({**found.added, **extra}.items(), key=lambda item: item[1]["id"])
    return replace(found, ids=ids, added=dict(added))


def _beside(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The added tokens of tokenizer_config.json and added_tokens.json, as entries of tokenizer.json."""
    path = folder / "tokenizer_config.json"
    decoder = read_json(path).get("added_tokens_decoder") if path.is_file() else None
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and _is_number(str(number)):
            yield entry["content"], {**entry, "id": int(number)}
    path = folder / "added_tokens.json"
    for content, number in (read_json(path) if path.is_file() else {}).items():
        yield content, {"content": content, "id": number, "special": True}


def _is_number(text: str) -> bool:
    return len(text) <= 18 and text.isdecimal()


def vocabulary_of(record: Mapping[str, Any], name: str, place: str) -> Vocabulary:
    """The vocabulary that a tokenizer.json describes; ``place`` is where it was found."""
    model = record.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{place}: no 'model'; this is no tokenizer, or one of an unknown format")
    kind = model.get("type") or _kind_of(model)
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
    _hold(ids, place)
    return Vocabulary(name, record, kind, ids, added)


def _hold(ids: Mapping[str, int], place: str) -> None:
    """Refuse ids far beyond the number of tokens."""
    largest = max(ids.values(), default=0)
    if largest > 2 * len(ids) + _MOST_HOLES:
        raise CheckpointError(
            f"{place}: {len(ids)} tokens, but one has id {largest}; its embeddings would be mostly empty"
        )


def _kind_of(model: Mapping[str, Any]) -> str:
    """The type of a model that does not name it, as old files don't."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model or "continuing_subword_prefix" in model else "WordLevel"


def _ordinary(model: Mapping[str, Any], kind: str, place: str) -> dict[str, int]:
    """The ordinary tokens and their ids."""
    vocab = model.get("vocab")
    if not isinstance(model.get("continuing_subword_prefix"), str | None):
        raise CheckpointError(f"{place}: 'continuing_subword_prefix' is no text")
    if kind == "Unigram":
        if not isinstance(vocab, list) or not all(_is_piece(piece) for piece in vocab):
            raise CheckpointError(f"{place}: 'vocab' is not a list of pieces and scores")
        # Of a piece that is listed twice the tokenizer uses the last; the others' ids have no token.
        return {piece[0]: number for number, piece in enumerate(vocab)}
    if not isinstance(vocab, dict) or not all(_is_id(number) for number in vocab.values()):
        raise CheckpointError(f"{place}: 'vocab' does not map tokens to ids")
    if kind == "BPE":
        _check_merges(model.get("merges"), vocab, len(model.get("continuing_subword_prefix") or ""), place)
    return dict(vocab)


def _check_merges(merges: Any, vocab: Mapping[str, int], prefix: int, place: str) -> None:
    if not isinstance(merges, list):
        raise CheckpointError(f"{place}: 'merges' is not a list")
    found = pairs(merges, place)
    made = {a + b[prefix:] for a, b in found}
    if vocab.keys() >= set(chain.from_iterable(found)) and vocab.keys() >= made:
        return
    a, b = next((a, b) for a, b in found if not {a, b, a + b[prefix:]} <= vocab.keys())
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
        if not all(isinstance(entry.get(key, False), bool) for key in SETTINGS):
            raise CheckpointError(
                f"{place}: a setting of the added token {entry['content']!r:.40} is not true or false"
            )
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
        and abs(value[1]) < _MOST_SCORE
    )
