"""What must be true of a finished model's vocabulary, checked on the files that are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.checkpoint import read_json
from mergekit.errors import CheckpointError
from mergekit.families.config import ids_beyond, vocab_size
from mergekit.families.layout import is_embedding
from mergekit.vocab.templates import chat_template, special_strings, syntax_fault
from mergekit.vocab.vocabulary import vocabulary_of

__all__ = ["vocabulary_faults"]


def vocabulary_faults(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What would go wrong with the vocabulary of the model in ``folder``, each in a line; nothing if it is sound.

    ``shapes`` are those of its tensors. Every token has an embedding row, config.json counts the rows, special tokens
    are among them, and the chat template can be read. A tokenizer with code or a format of its own is left to its own
    program.
    """
    rows = next((shape[0] for name, shape in shapes.items() if is_embedding(name) and shape), None)
    config = _json(folder / "config.json")
    faults = []
    if rows is not None and vocab_size(config) not in (None, rows):
        faults.append(f"config.json says vocab_size {vocab_size(config)}, but the embeddings have {rows} rows")
    limit = rows if rows is not None else vocab_size(config)
    if limit is not None:
        faults += _tokens_beyond(folder, limit)
        for name, settings in (("config.json", config), ("generation_config.json", _generation(folder))):
            faults += [
                f"{name}: {key} is {section[key]}, but the embeddings have {limit} rows"
                for section, key in ids_beyond(settings, limit)
            ]
    template = chat_template(folder)
    fault = syntax_fault(template) if template else None
    if fault:
        faults.append(f"the chat template can't be read: {fault}")
    return faults


def _tokens_beyond(folder: Path, rows: int) -> list[str]:
    """A fault if the tokenizer, as transformers completes it, has more tokens than rows."""
    path = folder / "tokenizer.json"
    record = _json(path)
    if "model" not in record:  # none, or one of a format of its own
        return []
    try:
        vocabulary = vocabulary_of(record, folder.name, str(path))
    except CheckpointError as error:
        return [str(error)]
    named = special_strings({**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")})
    added = sorted({token for token in named.values() if token not in vocabulary.ids})
    beyond = [f"{token!r} ({number})" for token, number in vocabulary.ids.items() if number >= rows]
    beyond += [f"{token!r} (added when loaded)" for token in added if vocabulary.size + len(added) > rows]
    if not beyond:
        return []
    return [f"{len(beyond)} tokens have no embedding row, of which there are {rows}: {', '.join(beyond[:3])}"]


def _generation(folder: Path) -> dict[str, Any]:
    return _json(folder / "generation_config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}
