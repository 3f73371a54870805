"""The licences of a merge's inputs taken together: what their own cards say, and no advice on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mergekit.errors import some_of
from mergekit.planning.input_cards import InputCards, Licence, read_card
from mergekit.planning.plan import Source

__all__ = ["input_cards", "licence_notes", "licence_warnings", "terms", "told_by_card"]

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
    """What the one licence of all inputs asks for, and which cards, or what they say of it, could not be read."""
    notes = [
        f"{name}: its README.md can't be read, so no licence, language or tag is taken from it"
        for name, c in cards.cards
        if not c.is_readable
    ]
    notes += [
        f"{name}: the licence in its README.md is none of the hub's names, so it is left out; read it there"
        for name, c in cards.cards
        if c.has_other_licence
    ]
    return notes + _common_note(cards)


def told_by_card(cards: InputCards) -> set[str]:
    """The warnings and notes that a model card has as a section of its own."""
    return {*licence_warnings(cards), *_common_note(cards)}


def _common_note(cards: InputCards) -> list[str]:
    asked = terms(cards.common) if cards.common else []
    return [f"the models' licence, {cards.common}: {'; '.join(asked)}"] if asked else []
