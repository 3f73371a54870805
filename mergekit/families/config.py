"""Facts in a model's config.json that a merge reads or must keep true: layers, vocabulary, tying, dtype."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit.dtypes import DType

__all__ = [
    "LayerSource",
    "is_tied",
    "layer_count",
    "set_dtype",
    "set_tied",
    "set_vocabulary",
    "stack_layers",
    "vocab_size",
]

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "decoder_layers")
_SECTIONS = ("text_config", "language_config", "llm_config", "decoder")
_NOT_PER_LAYER = ("token_id", "token_ids", "architectures", "_section", "_factor", "labels", "kernel_sizes")
_LAYER_NUMBERS = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "full_attention_layers",
                  "global_attn_layers", "cross_attention_layers")  # fmt: skip
_POSITIONAL = ("max_window_layers", "first_k_dense_replace", "sliding_window_pattern", "decoder_sparse_step",
               "full_attention_interval", "num_kv_shared_layers", "attn_layer_period", "expert_layer_period",
               "no_rope_layer_interval", "interleave_moe_layer_step")  # fmt: skip

LayerSource = tuple[Mapping[str, Any], int]
"""One output layer: the config of the model it comes from, and its number there."""


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: the config itself, or a section of it."""
    if any(isinstance(config.get(key), int) for key in _LAYER_KEYS):
        return config
    for name in _SECTIONS:
        section = config.get(name)
        if isinstance(section, Mapping):
            return section
    return config


def layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers that a config gives, or None."""
    section = _section(config)
    for key in _LAYER_KEYS:
        value = section.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """The vocabulary size that a config gives, or None."""
    for section in (_section(config), config):
        value = section.get("vocab_size")
        if isinstance(value, int):
            return value
    return None


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the config ties the head to the embeddings; None where it does not say."""
    for section in (config, _section(config)):
        value = section.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
    return None


def set_tied(config: dict[str, Any], tied: bool) -> None:
    """Record whether the head is tied, where the config says it now (the top level, and the section if it does)."""
    config["tie_word_embeddings"] = tied
    section = _section(config)
    if isinstance(section, dict) and section is not config and "tie_word_embeddings" in section:
        section["tie_word_embeddings"] = tied


def set_vocabulary(config: dict[str, Any], rows: int) -> None:
    """Record the number of embedding rows."""
    section = _section(config)
    target = section if isinstance(section, dict) and "vocab_size" in section else config
    target["vocab_size"] = rows


def set_dtype(config: dict[str, Any], dtype: DType) -> None:
    """Record the dtype under whichever key the config uses (``torch_dtype`` for the widest reach, else ``dtype``)."""
    sections = [config, *(s for s in config.values() if isinstance(s, dict))]
    for section in sections:
        for key in ("torch_dtype", "dtype"):
            if key in section:
                section[key] = dtype.name
    if not {"torch_dtype", "dtype"} & set(config):
        config["torch_dtype"] = dtype.name


def stack_layers(config: Mapping[str, Any], layers: Sequence[LayerSource]) -> tuple[dict[str, Any], list[str]]:
    """``config`` for a model made of ``layers``, and warnings.

    The layer count is set, each list with one entry per layer is put together from the sources' lists, and lists of
    layer numbers are renumbered. Settings that give layers a meaning by position (``max_window_layers``) can't be
    translated and are named in a warning.
    """
    result = copy.deepcopy(dict(config))
    section = _section(result)
    assert isinstance(section, dict)
    before = layer_count(config)
    warnings: list[str] = []
    known = [key for key in _LAYER_KEYS if isinstance(section.get(key), int)]
    for key in known:
        if section[key] == before:
            section[key] = len(layers)
    if not known:
        warnings.append(f"config.json names no layer count; set it to {len(layers)} by hand")
    moved = [number for _, number in layers] != list(range(before or 0))
    for key, value in list(section.items()):
        if key in _LAYER_NUMBERS and isinstance(value, list):
            section[key] = [new for new, (source, old) in enumerate(layers) if old in (_section(source).get(key) or [])]
        elif _is_per_layer(key, value, before):
            section[key] = [_entry(source, key, old, value) for source, old in layers]
        elif key in _POSITIONAL and value is not None and moved:
            warnings.append(
                f"config.json gives layers a meaning by position ('{key}': {value}); check it in the output"
            )
    return result, warnings


def _is_per_layer(key: str, value: object, count: int | None) -> bool:
    return isinstance(value, list) and count is not None and len(value) == count and not key.endswith(_NOT_PER_LAYER)


def _entry(source: Mapping[str, Any], key: str, number: int, fallback: Sequence[Any]) -> Any:
    values = _section(source).get(key)
    if isinstance(values, list) and number < len(values):
        return values[number]
    return fallback[number % len(fallback)]
