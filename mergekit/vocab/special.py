"""Token ids in a model's settings (``eos_token_id`` and the like) when its vocabulary changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.vocab.vocabulary import Vocabulary

__all__ = ["settle_token_ids", "token_ids"]

_SUFFIXES = ("_token_id", "_token_index")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def token_ids(settings: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Each setting that names tokens by id, and the ids: ``("eos_token_id", [2])``."""
    for key, value in settings.items():
        ids = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
        if (key.endswith(_SUFFIXES) or key in _LISTS) and ids and not isinstance(value, bool):
            yield key, ids


def settle_token_ids(
    settings: dict[str, Any],
    given: Mapping[str, Any],
    before: Vocabulary,
    output: Vocabulary,
    rows: int,
) -> list[str]:
    """Bring the token ids of ``settings`` in line with the vocabulary ``output``; returns warnings.

    ``given`` are the settings of the model whose tokenizer ``output`` starts from: its ids hold, also where
    ``settings`` name none. Others are ids of ``before``, and become those of the same tokens. An id without token or
    row becomes null.
    """
    warnings = []
    for key, _ in token_ids(given):
        if key.endswith(_SUFFIXES) and settings.get(key) is None:
            settings[key] = given[key]
    for key, ids in list(token_ids(settings)):
        theirs = dict(token_ids(given)).get(key)
        is_list = isinstance(settings[key] if theirs is None else given[key], list)
        found = theirs or [output.ids.get(before.by_id.get(i, ""), -1) for i in ids]
        kept = [i for i in found if 0 <= i < rows]
        if len(kept) < len(found):
            warnings.append(f"'{key}' named a token that the output has no row for; it is left out")
        settings[key] = kept if is_list and kept else kept[0] if kept else None
    return warnings
