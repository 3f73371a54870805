"""Find one model's tensors under another model's names: the same architecture saved by other classes or releases."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["WRAPPERS", "align", "core"]

WRAPPERS = frozenset(
    ["model", "transformer", "language_model", "vision_model", "backbone", "base_model", "gpt_neox", "bert", "roberta",
     "distilbert", "electra", "deberta"]
)  # fmt: skip
"""Modules that libraries add or drop when they save a bare model, or a model with a head, or in another release."""

_OLD_NORMS = {"gamma": "weight", "beta": "bias"}


def align(wanted: Iterable[str], present: Iterable[str]) -> dict[str, str]:
    """The names in ``wanted`` that are spelt otherwise in ``present``, and how.

    Two names are the same tensor's if they agree but for modules in ``WRAPPERS`` (and for the old spelling of norms),
    and if no third name does.

    >>> align(["bert.a.weight", "bert.a.LayerNorm.weight", "b"], ["a.weight", "a.LayerNorm.gamma", "b"])
    {'bert.a.weight': 'a.weight', 'bert.a.LayerNorm.weight': 'a.LayerNorm.gamma'}
    """
    mine, theirs = dict.fromkeys(wanted), dict.fromkeys(present)
    missing = _by_core(name for name in mine if name not in theirs)
    spare = _by_core(name for name in theirs if name not in mine) if missing else {}
    return {
        names[0]: spare[core][0] for core, names in missing.items() if len(names) == 1 and len(spare.get(core, ())) == 1
    }


def _by_core(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(core(name), []).append(name)
    return found


def core(name: str) -> str:
    """A name without wrappers, its norm spelt as today."""
    *modules, last = name.split(".")
    if modules and modules[-1].lower() in ("layernorm", "layer_norm"):
        last = _OLD_NORMS.get(last, last)
    return ".".join([*(module for module in modules if module not in WRAPPERS), last])
