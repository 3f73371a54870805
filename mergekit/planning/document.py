"""The small files of the output: config.json as text, and which files of the donor come along."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit.checkpoint import is_weight_file
from mergekit.dtypes import DType
from mergekit.errors import IncompatibleError
from mergekit.families.config import (
    ids_beyond,
    is_tied,
    language_section,
    set_dtype,
    set_tied,
    set_vocabulary,
    vocab_size,
)
from mergekit.families.layout import is_embedding, is_head
from mergekit.families.stacking import stack_layers
from mergekit.planning.express import Expresser, Made
from mergekit.planning.models import Models
from mergekit.planning.slots import Slots
from mergekit.planning.vocabulary import Alignment
from mergekit.vocab.special import settle_token_ids

__all__ = ["TOKENIZER_FILES", "donor_files", "files_to_copy", "make_config"]

TOKENIZER_FILES = frozenset(
    ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
     "merges.txt", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
     "chat_template.jinja", "chat_template.json"]
)  # fmt: skip
_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
_NOT_COPIED = re.compile(
    r"^(config\.json|mergekit_(moe_)?config\.ya?ml|merge_(stats|manifest)\.json|routing\.json|trainer_state\.json|"
    r"training_args.*|(all|train|eval)_results\.json|adapter_.*|quantize_config\.json|.*requirements.*\.txt|"
    r"optimizer.*|scheduler.*|model_index\.json|MANIFEST.*|README.*)$"
)
_MOST_BYTES = 200 * 1024 * 1024


def make_config(
    models: Models, slots: Slots, made: Sequence[Made], expresser: Expresser, dtype: DType | None
) -> tuple[str | None, list[str]]:
    """The text of config.json (None if the donor has none), and warnings.

    It is the donor's, with dtype, layer count, per-layer lists, vocabulary size and tying brought in line with the
    tensors that will be written. Without ``dtype`` from the recipe, that of the largest share of bytes is recorded.
    """
    donor = models[models.donor]
    if not donor.config:
        return None, [f"{donor.reference.short} has no config.json, so the output has none"]
    config = copy.deepcopy(dict(donor.config))
    warnings: list[str] = []
    if slots.layers is not None:
        assert donor.layout.main is not None
        config, warnings = stack_layers(config, slots.layers, donor.layout.main.count)
    config.pop("_name_or_path", None)
    if any(tensor.dtype.is_float for tensor in made):
        set_dtype(config, dtype or _main_dtype(made))
    if "quantization_config" in config:
        del config["quantization_config"]
        warnings.append("the quantised inputs were dequantised; quantization_config is left out of config.json")
    rows = expresser.rows if slots.layers is None else _stacked_vocabulary(made, expresser.rows)
    if rows is not None and vocab_size(config) != rows:
        set_vocabulary(config, rows)
    if expresser.alignment is not None:
        warnings += _follow_vocabulary(config, expresser.alignment)
    elif expresser.rows is not None:
        warnings += _drop_token_ids(config, expresser.rows)
    warnings += _settle_tying(config, models, slots)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n", warnings


def _stacked_vocabulary(made: Sequence[Made], cut: int | None) -> int | None:
    """Rows of the embeddings, which slices may take from another model than the donor. The head must have as many."""
    embedding = next((tensor for tensor in made if is_embedding(tensor.name)), None)
    head = next((tensor for tensor in made if is_head(tensor.name)), None)
    if embedding is None:
        return cut
    if head is not None and head.shape[0] != embedding.shape[0]:
        raise IncompatibleError(
            f"the first slice's embeddings have {embedding.shape[0]} rows, but the last slice's head has "
            f"{head.shape[0]}; take both slices from models with one vocabulary"
        )
    return embedding.shape[0]


def _follow_vocabulary(config: dict[str, Any], alignment: Alignment) -> list[str]:
    """Bring the ids of special tokens in line with the output's vocabulary."""
    owner = alignment.models[alignment.owner].config
    before, output = alignment.own[alignment.models.donor], alignment.output
    section = language_section(config)
    parts = [config] if section is config or not isinstance(section, dict) else [config, section]
    warnings = []
    for part in parts:
        given = owner if part is config else language_section(owner)
        warnings += settle_token_ids(part, given, before, output, alignment.rows)
    return [f"config.json: {text}" for text in dict.fromkeys(warnings)]


def _drop_token_ids(config: dict[str, Any], rows: int) -> list[str]:
    """Make special tokens beyond embeddings that were cut null: with such a pad_token_id a model can't be loaded."""
    beyond = ids_beyond(config, rows)
    for section, key in beyond:
        section[key] = None
    return [f"config.json: '{key}' is null, because the row of that token was cut" for _, key in beyond]


def _settle_tying(config: dict[str, Any], models: Models, slots: Slots) -> list[str]:
    """Untie the head in ``config`` if a model with a head of its own took part in it, and say so."""
    inputs = next((slot.contributions for slot in slots.slots if is_head(slot.name)), ())
    owners = [models[c.model] for c in inputs if c.info is not None and not c.tied]
    # A config that says nothing means the family's default, which is tied wherever no head is stored.
    some_tied = any(c.tied for c in inputs) or any(is_tied(owner.config) is False for owner in owners)
    if not owners or is_tied(config) is False or not (is_tied(config) or some_tied):
        return []
    set_tied(config, False)
    return [f"{owners[0].reference.short} has a head of its own, so the output's head is untied from its embeddings"]


def _main_dtype(made: Sequence[Made]) -> DType:
    shares: dict[DType, int] = {}
    for tensor in made:
        if tensor.dtype.is_float:
            size = tensor.dtype.size
            for length in tensor.shape:
                size *= length
            shares[tensor.dtype] = shares.get(tensor.dtype, 0) + size
    return max(shares, key=lambda d: shares[d])


def donor_files(models: Models, *, tokenizer: bool, owner: int | None = None) -> tuple[tuple[int, str], ...]:
    """The small files to copy, as (source, name): the donor's, and the tokenizer of ``owner`` (default: the donor)."""
    source, folder = models.tokenizer_of(models.donor if owner is None else owner)
    names = files_to_copy(models[models.donor].checkpoint.folder, tokenizer=tokenizer and source == models.donor)
    files = [(models.donor, name) for name in names]
    if tokenizer and source != models.donor:
        files += [(source, name) for name in files_to_copy(folder, tokenizer=True) if name in TOKENIZER_FILES]
    return tuple(files)


def files_to_copy(folder: Path, *, tokenizer: bool) -> list[str]:
    """The small files of the donor that a model needs: tokenizer, generation and processor settings, code, licence."""
    names = []
    for path in sorted(folder.iterdir()):
        name = path.name
        if not path.is_file() or name.startswith(".") or is_weight_file(name) or _NOT_COPIED.match(name):
            continue
        wanted = name.endswith(_SUFFIXES) or name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if not wanted or path.stat().st_size > _MOST_BYTES or (name in TOKENIZER_FILES and not tokenizer):
            continue
        names.append(name)
    return names
