"""How two tokenizers differ: tokens, ids, special tokens, chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.checkpoint import read_json
from mergekit.vocab.templates import chat_template, special_strings
from mergekit.vocab.vocabulary import SETTINGS, Vocabulary, pairs, read_vocabulary

__all__ = ["Difference", "compare_tokenizers"]

_SETTINGS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


@dataclass(frozen=True, slots=True)
class Difference:
    """Two tokenizers side by side.

    ``only_first`` and ``only_second`` are tokens of one of them, in order of id; ``moved`` those of both under
    different ids, as (token, first id, second id); ``special`` the named special tokens that differ, as (name, first,
    second); ``merges`` how many merges only one of them has; ``settings`` what else differs: parts of tokenizer.json
    and of its model, order, scores. ``templates``: the chat templates, None where there is none.
    """

    first: Vocabulary
    second: Vocabulary
    shared: int
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    moved: tuple[tuple[str, int, int], ...]
    special: tuple[tuple[str, str | None, str | None], ...]
    settings: tuple[str, ...]
    merges: tuple[int, int]
    templates: tuple[str | None, str | None]

    @property
    def is_none(self) -> bool:
        """Whether both give the same ids to the same text, and have the same special tokens and template."""
        found = (self.only_first, self.only_second, self.moved, self.special, self.settings)
        return not any(found) and self.merges == (0, 0) and self.templates[0] == self.templates[1]


def compare_tokenizers(first: tuple[Path, str], second: tuple[Path, str]) -> Difference:
    """The difference of the tokenizers in two folders, each given with the name of its model."""
    a, b = read_vocabulary(*first), read_vocabulary(*second)
    named = [_specials(folder) for folder, _ in (first, second)]
    names = dict.fromkeys([*named[0], *named[1]])
    moved = [(t, i, b.ids[t]) for t, i in a.ids.items() if t in b.ids and b.ids[t] != i]
    mine, theirs = (v.record["model"] for v in (a, b))
    added = [t for t, e in a.added.items() if t in b.added and _found(e) != _found(b.added[t])]
    settings = [name for name in _SETTINGS if a.record.get(name) != b.record.get(name)]
    settings += sorted(
        f"model.{name}"
        for name in {**mine, **theirs}
        if name not in ("vocab", "merges") and mine.get(name) != theirs.get(name)
    )
    merges = [dict.fromkeys(pairs(model["merges"] if v.kind == "BPE" else [])) for v, model in ((a, mine), (b, theirs))]
    if list(merges[0]) != list(merges[1]) and merges[0].keys() == merges[1].keys():
        settings.append("order of merges")
    if a.kind == b.kind == "Unigram" and _scores(a) != _scores(b):
        settings.append("scores of pieces")
    settings += [f"added token {token!r}" for token in added]
    return Difference(
        first=a,
        second=b,
        shared=sum(token in b.ids for token in a.ids),
        only_first=_only(a, b),
        only_second=_only(b, a),
        moved=tuple(sorted(moved, key=lambda entry: entry[1])),
        special=tuple((n, named[0].get(n), named[1].get(n)) for n in names if named[0].get(n) != named[1].get(n)),
        settings=tuple(settings),
        merges=(len([m for m in merges[0] if m not in merges[1]]), len([m for m in merges[1] if m not in merges[0]])),
        templates=(chat_template(first[0]), chat_template(second[0])),
    )


def _found(entry: Mapping[str, Any]) -> list[bool]:
    """How an added token is found in text."""
    return [bool(entry.get(key)) for key in SETTINGS]


def _scores(vocabulary: Vocabulary) -> dict[str, float]:
    return dict(vocabulary.record["model"]["vocab"])


def _only(a: Vocabulary, b: Vocabulary) -> tuple[str, ...]:
    return tuple(token for token, _ in sorted(a.ids.items(), key=lambda item: item[1]) if token not in b.ids)


def _specials(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        found |= special_strings(read_json(path)) if path.is_file() else {}
    return found
