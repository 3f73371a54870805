"""What merged models should agree on though their tensors fit without: rope, context length, templates, end of text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mergekit.planning.models import Model, Models

__all__ = ["disagreements", "same_tokenizer"]

_ABSENCE_COUNTS = ("rope scaling", "sliding window", "chat template")
"""Facts where saying nothing says something: plain rope, no window, no template."""


def disagreements(models: Models) -> list[str]:
    """A warning for each fact on which a model differs from the donor, saying whose was taken."""
    donor = models[models.donor]
    mine = _facts(donor)
    found = []
    for model in models.models:
        if model is donor:
            continue
        theirs = _facts(model)
        for fact, value in mine.items():
            other = theirs.get(fact)
            is_known = value is not None and other is not None
            if value != other and (is_known or fact in _ABSENCE_COUNTS):
                found.append(
                    f"{fact} differs: {donor.reference.short} has {_show(value)}, {model.reference.short} has "
                    f"{_show(other)}; {donor.reference.short}'s is taken"
                )
    return found


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
        "chat template": _chat_template(folder),
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


def _chat_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace").strip()
    path = folder / "tokenizer_config.json"
    if path.is_file():
        from mergekit.checkpoint import read_json

        value = read_json(path).get("chat_template")
        return value.strip() if isinstance(value, str) else None
    return None


def same_tokenizer(models: Models) -> bool:
    """Whether every model that has a ``tokenizer.json`` has the same one, byte for byte, and all have one."""
    digests = set()
    for position in range(len(models.models)):
        path = models.tokenizer_of(position)[1] / "tokenizer.json"
        if not path.is_file():
            return False
        digests.add(blake2b(path.read_bytes()).digest())
    return len(digests) == 1
