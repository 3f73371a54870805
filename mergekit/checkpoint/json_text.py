"""JSON of strangers: parsed only if what it would make in memory is of a size that a model's files have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

__all__ = ["parse_json"]

_MOST_CONTAINERS, _MOST_ENTRIES = 2_000_000, 5_000_000
"""A tokenizer of 250,000 tokens with its merges has a third of that, a header of 200,000 tensors half."""
_DEEPEST = 100
_LARGEST = 1 << 1000
"""What still fits into a floating point number."""
_WALKED = 1 << 22
"""Bytes up to which depth and numbers are looked at. Larger files are tokenizers and indices: two levels are used."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a character beyond the first 65,536: without the other half it can't be written again."""


def parse_json(raw: bytes, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value that ``raw`` (UTF-8) describes.

    ValueError, with what is wrong in a few words, if it is no JSON, nested too deeply, holds what is no text, or would
    take a lot more memory than its own size: an empty list takes twenty times the two bytes that describe it.
    """
    if raw.count(b"[") + raw.count(b"{") > _MOST_CONTAINERS or raw.count(b",") > _MOST_ENTRIES:
        raise ValueError("it has more entries than any file of a model")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (UnicodeEncodeError, RecursionError):
            raise ValueError("it holds half of a surrogate pair") from None
    if len(raw) < _WALKED:
        _check(value)
    return value


def _check(value: Any) -> None:
    """Refuse what is nested deeper, or a larger number, than any that we would pass on."""
    level = [value]
    for _ in range(_DEEPEST):
        if any(isinstance(item, int) and not -_LARGEST < item < _LARGEST for item in level):
            raise ValueError("it holds a number of hundreds of digits")
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            return
        level = [part for item in containers for part in (item.values() if isinstance(item, dict) else item)]
    raise ValueError("nested too deeply")
