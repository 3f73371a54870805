"""What merged models should agree on though their tensors fit without: rope, context length, templates, end of text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.planning.models import Model, Models
from mergekit.planning.vocabulary import Alignment
from mergekit.vocab.templates import chat_template
from mergekit.vocab.vocabulary import Vocabulary

__all__ = ["disagreements"]

_ABSENCE_COUNTS = ("rope scaling", "sliding window", "chat template")
"""Facts where saying nothing says something: plain rope, no window, no template."""
_OF_THE_TOKENIZER = ("end-of-text token", "chat template")


def disagreements(models: Models, alignment: Alignment | None = None, *, has_template: bool = False) -> list[str]:
    """A warning for each fact on which a model differs from the one that it is taken from, which it names.

    That is the donor, and for facts of the tokenizer its owner. ``has_template``: the recipe chooses the chat template.
    """
    donor = models[models.donor]
    owner = donor if alignment is None else models[alignment.owner]
    facts = [_facts(model) for model in models.models]
    if alignment is not None:
        for mine, vocabulary in zip(facts, alignment.own, strict=True):
            mine["end-of-text token"] = _tokens(mine["end-of-text token"], vocabulary)
    if has_template:
        for mine in facts:
            del mine["chat template"]
    found = []
    for model, theirs in zip(models.models, facts, strict=True):
        for fact in theirs:
            taken = owner if fact in _OF_THE_TOKENIZER else donor
            value, other = facts[models.models.index(taken)][fact], theirs[fact]
            is_known = value is not None and other is not None
            if model is not taken and value != other and (is_known or fact in _ABSENCE_COUNTS):
                found.append(
                    f"{fact} differs: {taken.reference.short} has {_show(value)}, {model.reference.short} has "
                    f"{_show(other)}; {taken.reference.short}'s is taken"
                )
    return found


def _tokens(ids: Any, vocabulary: Vocabulary) -> Any:
    """Token ids as tokens, which compare across vocabularies."""
    if isinstance(ids, list):
        return [_tokens(i, vocabulary) for i in ids]
    return vocabulary.by_id.get(ids, ids) if isinstance(ids, int) else ids


def _show(value: Any) -> str:
    if value is None:
        return "none"
    text = json.dumps(value, sort_keys=True, default=str) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


def _facts(model: Model) -> dict[str, Any]:
    config: Mapping[str, Any] = model.config
    section = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    assert isinstance(section, Mapping)
    rope = section.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    folder = model.checkpoint.folder
    return {
        "rope theta": section.get("rope_theta", rope.get("rope_theta")),
        "rope scaling": _scaling(section.get("rope_scaling") or rope),
        "context length": section.get("max_position_embeddings", section.get("n_positions")),
        "activation": section.get("hidden_act", section.get("activation_function")),
        "sliding window": section.get("sliding_window"),
        "end-of-text token": _eos(config, folder),
        "chat template": chat_template(folder),
    }


def _scaling(value: Any) -> Any:
    """Rope scaling without what other facts tell and without spelling differences; None for plain rope."""
    if not isinstance(value, Mapping):
        return None
    record = {k: v for k, v in value.items() if k not in ("rope_theta", "type", "rope_type")}
    kind = value.get("rope_type", value.get("type", "default"))
    return None if kind == "default" and not record else {"type": kind, **record}


def _eos(config: Mapping[str, Any], folder: Path) -> Any:
    from mergekit.checkpoint import read_json

    path = folder / "generation_config.json"
    value = read_json(path).get("eos_token_id") if path.is_file() else None
    return value if value is not None else config.get("eos_token_id")
