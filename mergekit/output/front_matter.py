"""The head of a model card: the metadata that the hub reads. Every value is ours, or of a form that was checked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from mergekit.families.config import auto_class
from mergekit.hub import is_local
from mergekit.planning.input_cards import InputCards
from mergekit.planning.plan import Plan, Source
from mergekit.recipe.text import dump_yaml
from mergekit.refs import ModelPath

__all__ = ["front_matter", "hub_commit", "hub_name", "hub_names"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_TAGS = 24


def front_matter(plan: Plan, tags: Sequence[str]) -> str:
    """The YAML between two lines of dashes. ``tags`` come before those that the inputs hand down."""
    names, cards = hub_names(plan), plan.cards
    entries: dict[str, Any] = {"base_model": names} if names else {}
    if names and sum(not (source.adapter or source.prepared) for source in plan.sources) > 1:
        entries["base_model_relation"] = "merge"
    if plan.config:
        entries["library_name"] = "transformers"
    entries.update(_task(plan, cards), **_licence(cards))
    if languages := _union(card.languages for _, card in cards.cards):
        entries["language"] = languages
    entries["tags"] = _union([("mergekit", "merge", *tags), *(card.tags for _, card in cards.cards)])[:_MOST_TAGS]
    return f"---\n{dump_yaml(entries)}\n---\n"


def hub_names(plan: Plan) -> list[str]:
    """The models and adapters that are repositories on the hub."""
    return list(dict.fromkeys(name for source in plan.sources if (name := hub_name(source))))


def hub_name(source: Source) -> str | None:
    """The repository of a source (of a model with an adapter, the model's), None if it is a folder here."""
    path = source.reference.partition("+")[0]
    name = path.partition("@")[0]
    if source.prepared or os.path.exists(path) or is_local(ModelPath(name)):
        return None
    return name if _HUB_NAME.fullmatch(name) else None


def hub_commit(source: Source) -> str | None:
    """The commit of a source from the hub: its folder in the cache is named after it."""
    parent, commit = os.path.split(source.folder)
    is_snapshot = os.path.basename(parent) == "snapshots" and _COMMIT.fullmatch(commit)
    return commit if is_snapshot and hub_name(source) else None


def _task(plan: Plan, cards: InputCards) -> dict[str, str]:
    """The task that the inputs name, if they don't contradict each other, else that of the architecture."""
    found = {card.task: None for _, card in cards.cards if card.task}
    if len(found) == 1:
        return {"pipeline_tag": next(iter(found))}
    is_causal = bool(plan.config) and auto_class(json.loads(plan.config)) == "AutoModelForCausalLM"
    return {"pipeline_tag": "text-generation"} if is_causal else {}


def _licence(cards: InputCards) -> dict[str, Any]:
    if cards.differ:
        return {"license": "other", "license_name": "licences-of-the-inputs"}
    licence = cards.common
    if licence is None:
        return {}
    identifiers = licence.identifiers
    entries: dict[str, Any] = {"license": identifiers[0] if len(identifiers) == 1 else list(identifiers)}
    if licence.name:
        entries["license_name"] = licence.name
    if licence.link:
        entries["license_link"] = licence.link
    return entries


def _union(groups: Any) -> list[str]:
    return list(dict.fromkeys(item for group in groups for item in group))
