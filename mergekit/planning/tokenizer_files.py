"""The tokenizer's files in the output: copied byte for byte where nothing changes, else written anew."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.checkpoint import read_json
from mergekit.errors import MergekitError
from mergekit.planning.document import TOKENIZER_FILES, donor_files
from mergekit.planning.models import Models
from mergekit.planning.vocabulary import Alignment
from mergekit.recipe import Recipe
from mergekit.vocab.special import settle_token_ids
from mergekit.vocab.templates import BUILT_IN, chat_template, special_strings, template_fault, template_text
from mergekit.vocab.union import as_text
from mergekit.vocab.vocabulary import read_vocabulary

__all__ = ["SmallFiles", "small_files"]

_CONTROL = re.compile(r"<\|[a-z0-9_]+\|>")

_KEPT = frozenset(["special_tokens_map.json", "chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
"""Tokenizer files that a new vocabulary leaves true; the others spell out the old one."""


@dataclass(slots=True)
class SmallFiles:
    """``copied``: files to copy, as (source, name); ``texts``: files to write, as (name, text); and ``warnings``."""

    copied: list[tuple[int, str]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def small_files(recipe: Recipe, models: Models, alignment: Alignment | None, *, tokenizer: bool) -> SmallFiles:
    """The small files of the output besides config.json: the donor's, and the tokenizer's.

    ``tokenizer``: copy the donor's tokenizer; one that the recipe asks for is always there.
    """
    owner = models.donor if alignment is None else alignment.owner
    wanted = tokenizer or alignment is not None
    files = SmallFiles(list(donor_files(models, tokenizer=wanted, owner=owner)))
    folder = models.tokenizer_of(owner)[1]
    if alignment is not None and alignment.is_new:
        _rewrite(files, alignment, folder)
    if wanted:
        _set_template(recipe, models, alignment, files, folder)
    elif recipe.config.chat_template is not None:
        files.warnings.append("'chat_template' is not applied, because no tokenizer is copied")
    if alignment is not None and alignment.owner != models.donor:
        _settle_generation(models, alignment, files)
    files.copied = [(source, name) for source, name in files.copied if name not in files.texts]
    return files


def _rewrite(files: SmallFiles, alignment: Alignment, folder: Path) -> None:
    """Replace the files that hold the vocabulary."""
    output = alignment.output
    dropped = [name for _, name in files.copied if name in TOKENIZER_FILES and name not in _KEPT | {"tokenizer.json"}]
    files.copied = [(s, n) for s, n in files.copied if n not in dropped]
    if dropped:
        files.warnings.append(
            f"{', '.join(dropped)} of {output.name} would not fit the new vocabulary and are left out; "
            "tokenizer.json has it all"
        )
    files.texts["tokenizer.json"] = as_text(output)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    config["added_tokens_decoder"] = {
        str(entry["id"]): {"content": content, **{key: value for key, value in entry.items() if key != "id"}}
        for content, entry in output.added.items()
    }
    files.texts["tokenizer_config.json"] = _json(config)


def _set_template(recipe: Recipe, models: Models, alignment: Alignment | None, files: SmallFiles, folder: Path) -> None:
    """Put the chat template that the recipe asks for into the files, if it is not there."""
    wanted = _template(recipe, models, folder)
    if wanted is None or wanted.strip() == chat_template(folder):
        return
    strange = _strange(wanted, alignment, folder)
    if strange:
        files.warnings.append(
            f"the chat template uses {', '.join(strange[:4])}, which the vocabulary does not have as "
            f"{'a token' if len(strange) == 1 else 'tokens'}, so the model will see pieces of text"
        )
    files.texts["chat_template.jinja"] = wanted
    path = folder / "tokenizer_config.json"
    text = files.texts.get("tokenizer_config.json")
    config: dict[str, Any] = json.loads(text) if text else read_json(path) if path.is_file() else {}
    if "chat_template" in config:  # older programs read it here
        config["chat_template"] = wanted
        files.texts["tokenizer_config.json"] = _json(config)


def _strange(template: str, alignment: Alignment | None, folder: Path) -> list[str]:
    """What a template writes like a special token, though the vocabulary has none such."""
    try:
        output = read_vocabulary(folder, folder.name) if alignment is None else alignment.output
    except MergekitError:  # nothing else asks for the vocabulary, so what is wrong with it is no fault of the merge
        return []
    return [token for token in dict.fromkeys(_CONTROL.findall(template)) if token not in output.ids]


def _template(recipe: Recipe, models: Models, folder: Path) -> str | None:
    """The chat template that the recipe asks for, checked; None to keep the tokenizer's own."""
    value = recipe.config.chat_template
    if value is None:
        return None
    path = folder / "tokenizer_config.json"
    tokens = special_strings(read_json(path) if path.is_file() else {})
    tokens = {"bos_token": "", "eos_token": "", **tokens}
    if value == "auto":
        found = [chat_template(models.tokenizer_of(i)[1]) for i in range(len(models.models))]
        counts = Counter(text for text in found if text)
        text = counts.most_common(1)[0][0] if counts else None
        if text is None:
            return None
    else:
        text = template_text(value)
        if text is None:
            raise recipe.fault(
                f"'{value:.40}' is no chat template: give 'auto', one of {', '.join(BUILT_IN)}, or a jinja text",
                "chat_template",
            )
    fault = template_fault(text, tokens)
    if fault:
        raise recipe.fault(f"the chat template can't be used: {fault}", "chat_template")
    return text


def _settle_generation(models: Models, alignment: Alignment, files: SmallFiles) -> None:
    """Bring the token ids of generation_config.json in line with the tokenizer."""
    path = models[models.donor].checkpoint.folder / "generation_config.json"
    owner = models[alignment.owner]
    theirs = owner.checkpoint.folder / "generation_config.json"
    if not path.is_file() and not theirs.is_file():
        return
    given = {**owner.config, **(read_json(theirs) if theirs.is_file() else {})}
    settings = read_json(path) if path.is_file() else {}
    own = alignment.own[models.donor]
    warnings = settle_token_ids(settings, given, own, alignment.output, alignment.rows)
    files.warnings += [f"generation_config.json: {text}" for text in warnings]
    files.texts["generation_config.json"] = _json(settings)


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
