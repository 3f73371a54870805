"""The licences of a merge's inputs taken together: what their own cards say, and no advice on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit.errors import some_of
from mergekit.planning.input_cards import InputCard, Licence, read_card
from mergekit.planning.plan import Source

__all__ = ["InputCards", "input_cards", "licence_notes", "licence_warnings", "terms"]

_TERMS: tuple[tuple[str, str], ...] = (
    (r"\bnc\b|non-?commercial", "for non-commercial use"),
    (r"\bmnpl\b|non-?production|\bresearch\b", "not for use in production"),
    (r"\bnd\b", "changed versions may not be passed on"),
    (r"^[al]?gpl|\bsa\b|\bshare-?alike\b", "what is made from it stays under it"),
    (r"^llama-?3$", "asks for 'Built with Meta Llama 3' and a name that begins with 'Llama 3'"),
    (r"^llama-?(3\.\d|4)", "asks for 'Built with Llama' and a name that begins with 'Llama'"),
    (r"^llama-?2", "asks to pass on its notice and its policy of use"),
    (r"^gemma|rail\b|^bigscience|^bigcode", "asks to pass on its limits of use"),
)
"""What licences are known to ask beyond their notice, by their identifiers and names on the hub."""


@dataclass(frozen=True, slots=True)
class InputCards:
    """The cards of the inputs by short name, in the order of the plan."""

    cards: tuple[tuple[str, InputCard], ...]

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


def input_cards(sources: Sequence[Source]) -> InputCards:
    """The cards of the models and adapters of a plan; of a model with an adapter, the model's own."""
    named = [(source.short.partition("+")[0], source.folder) for source in sources if not source.prepared]
    return InputCards(tuple((name, read_card(Path(folder))) for name, folder in dict.fromkeys(named)))


def terms(licence: Licence) -> list[str]:
    """What a licence asks for beyond its notice, in a few words each, as far as its name tells."""
    texts = [text.lower().replace("_", "-") for text in (*licence.identifiers, licence.name or "")]
    return [words for pattern, words in _TERMS if any(re.search(pattern, text) for text in texts)]


def licence_warnings(cards: InputCards) -> list[str]:
    """A warning if the inputs' licences differ, with the models under each."""
    if not cards.differ:
        return []
    parts = []
    for licence, names in cards.licences.items():
        asked = "; ".join(terms(licence)) if licence else ""
        what = f"{licence} ({asked})" if asked else str(licence or "none named")
        parts.append(f"{some_of(names)}: {what}")
    return [f"the models' licences differ: {', '.join(parts)}; read them before you pass the result on"]


def licence_notes(cards: InputCards) -> list[str]:
    """What the one licence of all inputs asks for, and which cards could not be read."""
    notes = [
        f"{name}: its README.md can't be read, so no licence, language or tag is taken from it"
        for name, c in cards.cards
        if not c.is_readable
    ]
    if cards.common and (asked := terms(cards.common)):
        notes.append(f"the models' licence, {cards.common}: {'; '.join(asked)}")
    return notes
