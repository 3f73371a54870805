"""The config.json of a model made of other models' layers: its layer count, and what is said of each layer.

A config may give layers a meaning by their position. What has a list form is written down as a list and follows the
layers; what has none is named in a warning.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit.families.config import LAYER_KEYS, language_section, layer_count

__all__ = ["LayerSource", "stack_layers"]

LayerSource = tuple[Mapping[str, Any], int]
"""One output layer: the config of the model it comes from, and its number there."""

_NOT_PER_LAYER = ("token_id", "token_ids", "architectures", "_section", "_factor", "labels", "kernel_sizes")
_LETTER_PER_LAYER = ("hybrid_override_pattern",)
_LAYER_NUMBERS = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "full_attention_layers",
                  "hybrid_layer_ids", "local_layer_ids", "ple_layer_ids", "global_attn_layers",
                  "cross_attention_layers")  # fmt: skip
_ATTENTION_BY_POSITION = ("max_window_layers", "sliding_window_pattern", "full_attention_interval", "attn_layer_period",
                          "global_attn_every_n_layers", "layer_group_size", "attention_types")  # fmt: skip
_MLP_BY_POSITION = ("first_k_dense_replace", "decoder_sparse_step", "moe_layer_freq", "moe_layer_interval",
                    "moe_layer_start_index", "expert_layer_period", "interleave_moe_layer_step",
                    "num_dense_layers")  # fmt: skip
_OTHER_BY_POSITION = ("num_kv_shared_layers", "hidden_size_per_layer_input", "no_rope_layer_interval",
                      "cross_attention_frequency")  # fmt: skip
_EVERY_LAYER = ("decoder_sparse_step", "moe_layer_freq", "moe_layer_interval", "interleave_moe_layer_step",
                "attn_layer_period", "expert_layer_period", "layer_group_size")  # fmt: skip
"""Settings where 1 means that all layers are alike."""
_EXTRA_LAYERS = "num_nextn_predict_layers"
_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
"""Families whose older configs leave unsaid that every n-th layer has full attention, and the others a window."""


def stack_layers(
    config: Mapping[str, Any], layers: Sequence[LayerSource], count: int
) -> tuple[dict[str, Any], list[str]]:
    """``config``, of a model with ``count`` layers, for a model made of ``layers``; and warnings."""
    result = copy.deepcopy(dict(config))
    section = language_section(result)
    assert isinstance(section, dict)
    before = layer_count(config) or count
    warnings: list[str] = []
    known = [key for key in LAYER_KEYS if section.get(key) == before]
    section.update(dict.fromkeys(known, len(layers)))
    moved = [number for _, number in layers] != list(range(len(layers)))
    kinds = _kinds(section, before)
    if moved and kinds is not None:
        section["layer_types"] = kinds
    sources = [(language_section(source), number) for source, number in layers]
    per_layer = [key for key, value in section.items() if _is_per_layer(key, value, before)]
    for key, value in list(section.items()):
        if key in _LAYER_NUMBERS and isinstance(value, list):
            section[key] = [new for new, (source, old) in enumerate(sources) if old in (source.get(key) or [])]
        elif key in per_layer:
            entries = [_entry(source, key, old, value) for source, old in sources]
            section[key] = "".join(entries) if isinstance(value, str) else entries
        elif moved and _matters(key, section):
            warnings.append(
                f"config.json gives layers a meaning by position ('{key}': {value}); check it in the output"
            )
    if not known and not per_layer:
        warnings.append(f"config.json names no layer count; set it to {len(layers)} by hand")
    if section.get(_EXTRA_LAYERS):
        section[_EXTRA_LAYERS] = 0
    return result, warnings


def _kinds(section: Mapping[str, Any], count: int) -> list[str] | None:
    """The kind of attention of each layer, where a config implies it by position; None where it does not."""
    if isinstance(section.get("layer_types"), list):
        return None
    first_window, period = 0, section.get("sliding_window_pattern") or _PERIODS.get(str(section.get("model_type")))
    if section.get("use_sliding_window") and isinstance(section.get("max_window_layers"), int):
        first_window, period = section["max_window_layers"], count + 1
    if not isinstance(period, int):
        return None
    is_full = [number < first_window or (number + 1) % period == 0 for number in range(count)]
    return ["full_attention" if full else "sliding_attention" for full in is_full]


def _is_per_layer(key: str, value: object, count: int) -> bool:
    is_list = isinstance(value, list) or (isinstance(value, str) and key in _LETTER_PER_LAYER)
    return is_list and len(value) == count and not key.endswith(_NOT_PER_LAYER)  # type: ignore[arg-type]


def _entry(source: Mapping[str, Any], key: str, number: int, fallback: Sequence[Any]) -> Any:
    values = source.get(key)
    if values is None and key == "layer_types":
        values = _kinds(source, number + 1)
    if isinstance(values, (list, str)) and number < len(values):
        return values[number]
    return fallback[number % len(fallback)]


def _matters(key: str, section: Mapping[str, Any]) -> bool:
    """Whether a setting tells layers apart by position, and no list in the config settles it."""
    value = section.get(key)
    if not value or (value == 1 and key in _EVERY_LAYER):
        return False
    if key in _ATTENTION_BY_POSITION:
        if key == "max_window_layers" and not section.get("use_sliding_window", True):
            return False
        return not isinstance(section.get("layer_types"), list)
    if key in _MLP_BY_POSITION:
        return not isinstance(section.get("mlp_layer_types"), list)
    return key in _OTHER_BY_POSITION
