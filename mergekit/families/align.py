"""Find one model's tensors under another model's names: the same architecture saved with or without a prefix."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["PREFIXES", "alias_prefix", "find_alias"]

PREFIXES = ("model.", "transformer.", "bert.", "roberta.", "distilbert.", "gpt_neox.", "language_model.",
            "model.language_model.", "backbone.", "base_model.")  # fmt: skip
"""Prefixes that libraries add or drop when they save the bare model or the model with a head."""


def alias_prefix(wanted: Collection[str], present: Collection[str]) -> tuple[str, str] | None:
    """How names in ``wanted`` turn into names in ``present``: (prefix to drop, prefix to add), or None if as they are.

    Chosen only when it finds more tensors than the plain names do.

    >>> alias_prefix({"bert.a", "bert.b"}, {"a", "b"})
    ('bert.', '')
    """
    have = set(present)
    best, found = None, sum(name in have for name in wanted)
    if found == len(wanted):
        return None
    candidates = [(p, "") for p in PREFIXES] + [("", p) for p in PREFIXES]
    candidates += [(p, q) for p in PREFIXES for q in PREFIXES if p != q]
    for drop, add in candidates:
        hits = sum(find_alias(name, (drop, add)) in have for name in wanted)
        if hits > found:
            best, found = (drop, add), hits
    return best


def find_alias(name: str, alias: tuple[str, str] | None) -> str:
    """``name`` with the alias applied (unchanged where its prefix does not fit)."""
    if alias is None or not name.startswith(alias[0]):
        return name
    return alias[1] + name.removeprefix(alias[0])
