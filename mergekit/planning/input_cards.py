"""What the README.md of an input says of it: licence, languages, tags. It is a stranger's text until checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.errors import RecipeError

__all__ = ["InputCard", "InputCards", "Licence", "read_card"]

_MAX_BYTES = 1 << 20
"""Cards with thousands of benchmark results have a third of that."""
_MOST = 64
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.S | re.M)
_ENTRY = re.compile(
    r"^([\"']?)([A-Za-z_][\w-]*)\1[ \t]*:(?=\s|$).*\n?(?:(?![\"']?[A-Za-z_][\w-]*[\"']?[ \t]*:).*\n?)*", re.M
)
_FLOW = re.compile(r"(?:[ \t]*(?:#.*)?\n)*[ \t]*\{")
_WANTED = frozenset(["license", "license_name", "license_link", "language", "tags", "pipeline_tag"])
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,()+/_-]{0,95}")
_NO_LICENCE = ("unknown", "none")
_LINK = re.compile(r"https://[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[A-Za-z0-9._~%+=?&#/-]*)?")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}")
_TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,7}")
_OF_THE_FILES = frozenset(
    ["generated_from_trainer", "trl", "sft", "dpo", "unsloth", "axolotl", "llama-factory", "peft", "adapter", "lora",
     "qlora", "gguf", "gptq", "awq", "exl2", "mlx", "bnb", "quantized", "4-bit", "8-bit", "4bit", "8bit",
     "bitsandbytes", "safetensors", "pytorch", "tensorboard", "transformers", "mergekit", "merge"]
)  # fmt: skip
"""Tags that say how an input was trained or stored, which is not true of what is made from it."""


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence as a card of the hub gives it: identifiers (mostly one), and for ``other`` a name and a link."""

    identifiers: tuple[str, ...]
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        """What people call it."""
        return self.name if self.name and self.identifiers == ("other",) else " and ".join(self.identifiers)


@dataclass(frozen=True, slots=True)
class InputCard:
    """The facts of a card that what is made from the model inherits. ``is_readable`` is False for a broken one.

    ``has_other_licence``: what it says of a licence has no known form, and is left out.
    """

    licence: Licence | None = None
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    task: str | None = None
    is_readable: bool = True
    has_other_licence: bool = False


@dataclass(frozen=True, slots=True)
class InputCards:
    """The cards of the inputs by short name, in the order of the plan."""

    cards: tuple[tuple[str, InputCard], ...] = ()

    @property
    def licences(self) -> dict[Licence | None, list[str]]:
        """Each licence with the names of the models under it; None for those that name none."""
        found: dict[Licence | None, list[str]] = {}
        for name, card in self.cards:
            found.setdefault(card.licence, []).append(name)
        return found

    @property
    def differ(self) -> bool:
        """Whether the inputs name more than one licence, or only some of them name one."""
        return len(self.licences) > 1

    @property
    def common(self) -> Licence | None:
        """The licence that every input names, if they all name the same."""
        return None if self.differ else next(iter(self.licences), None)


def read_card(folder: Path) -> InputCard:
    """The card in a model's folder; an empty one where there is none. What has no proper form is left out."""
    from mergekit.recipe.text import read_recipe_text

    try:
        path = folder / "README.md"
        if not path.is_file():  # a pipe would block
            return InputCard()
        with path.open("rb") as stream:
            text = stream.read(_MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return InputCard(is_readable=False)
    found = _FRONT_MATTER.match(text)
    if found is None or not re.sub(r"^[ \t]*#.*", "", found[1], flags=re.M).strip():
        return InputCard(is_readable=not text.startswith("---") or found is not None)
    try:
        entries = read_recipe_text(_wanted(found[1]), "README.md").value
    except RecipeError:
        return InputCard(is_readable=False)
    return InputCard(
        licence=_licence(entries),
        has_other_licence=_is_other(entries.get("license")),
        languages=_texts(entries.get("language"), _LANGUAGE),
        tags=tuple(tag for tag in _texts(entries.get("tags"), _TAG) if tag.lower() not in _OF_THE_FILES),
        task=next(iter(_texts(entries.get("pipeline_tag"), _TASK)), None),
    )


def _wanted(text: str) -> str:
    """The entries of the front matter that are used: the results of benchmarks may take a second to read.

    All of it where it is not a list of entries at the start of lines: in braces, or indented.
    """
    entries = list(_ENTRY.finditer(text))
    if not entries or _FLOW.match(text):
        return text
    return "".join(entry[0] for entry in entries if entry[2] in _WANTED) or "tags: []"


def _licence(entries: dict[str, Any]) -> Licence | None:
    identifiers = tuple(i for i in _texts(entries.get("license"), _IDENTIFIER) if i.lower() not in _NO_LICENCE)
    name, link = (
        next(iter(_texts(entries.get(key), form)), None)
        for key, form in (("license_name", _NAME), ("license_link", _LINK))
    )
    return Licence(tuple(map(str.lower, identifiers)), name, link) if identifiers else None


def _is_other(value: Any) -> bool:
    """Whether something stands for a licence that is none of the hub's identifiers."""
    items = value if isinstance(value, list) else [value]
    texts = ["" if item is None else item.strip() if isinstance(item, str) else "?" for item in items]
    return any(text and not _IDENTIFIER.fullmatch(text) for text in texts)


def _texts(value: Any, form: re.Pattern[str]) -> tuple[str, ...]:
    """One text or a list of texts, each once, as far as they have the form."""
    return tuple(dict.fromkeys(text for text in _given(value) if form.fullmatch(text)))


def _given(value: Any) -> Iterator[str]:
    for item in value[:_MOST] if isinstance(value, list) else [value]:
        if item is False:  # Norwegian, as YAML reads it
            yield "no"
        elif isinstance(item, str):
            yield item.strip()
