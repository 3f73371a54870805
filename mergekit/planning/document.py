"""The small files of the output: config.json as text, and which files of the donor come along."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path

from mergekit.checkpoint import is_weight_file
from mergekit.dtypes import DType
from mergekit.families.config import is_tied, set_dtype, set_tied, set_vocabulary, stack_layers, vocab_size
from mergekit.families.layout import is_head
from mergekit.planning.express import Expresser, Made
from mergekit.planning.models import Models
from mergekit.planning.slots import Slots

__all__ = ["TOKENIZER_FILES", "files_to_copy", "make_config"]

TOKENIZER_FILES = frozenset(
    ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
     "merges.txt", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
     "chat_template.jinja", "chat_template.json"]
)  # fmt: skip
_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
_NOT_COPIED = re.compile(
    r"^(config\.json|mergekit_config\.ya?ml|merge_stats\.json|trainer_state\.json|training_args.*|all_results\.json|"
    r"(train|eval)_results\.json|adapter_.*|quantize_config\.json|.*requirements.*\.txt|optimizer.*|scheduler.*|"
    r"model_index\.json|MANIFEST.*|README.*)$"
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
        config, warnings = stack_layers(config, slots.layers)
    config.pop("_name_or_path", None)
    if any(tensor.dtype.is_float for tensor in made):
        set_dtype(config, dtype or _main_dtype(made))
    if "quantization_config" in config:
        del config["quantization_config"]
        warnings.append("the quantised inputs were dequantised; quantization_config is left out of config.json")
    if expresser.rows is not None and vocab_size(config) != expresser.rows:
        set_vocabulary(config, expresser.rows)
    has_head = any(is_head(tensor.name) for tensor in made)
    untied = [m.reference.short for m in models.models if m.head is not None]
    if has_head and untied and is_tied(config):
        set_tied(config, False)
        warnings.append(f"{untied[0]} has a head of its own, so the output's head is untied from its embeddings")
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n", warnings


def _main_dtype(made: Sequence[Made]) -> DType:
    shares: dict[DType, int] = {}
    for tensor in made:
        if tensor.dtype.is_float:
            size = tensor.dtype.size
            for length in tensor.shape:
                size *= length
            shares[tensor.dtype] = shares.get(tensor.dtype, 0) + size
    return max(shares, key=lambda d: shares[d])


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
