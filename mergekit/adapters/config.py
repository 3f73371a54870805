"""The settings of an adapter (``adapter_config.json``): what scales its product, and what of it can't be baked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergekit.checkpoint import read_json
from mergekit.errors import CheckpointError, ModelNotFoundError

__all__ = ["CONFIG", "AdapterConfig", "is_four_bit_name", "read_adapter_config"]

CONFIG = "adapter_config.json"

_KEEP_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Ways to initialise an adapter that leave the base model as it is."""
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NOT_BAKED = {
    "layer_replication": "repeats layers of the base",
    "target_parameters": "changes parameters that are no layers of their own",
    "trainable_token_indices": "changes single rows of the embeddings",
    "lora_bias": "has biases in its product",
    "alora_invocation_tokens": "acts on some tokens only",
    "use_qalora": "pools its inputs (QA-LoRA)",
    "use_bdlora": "is block-diagonal (BD-LoRA)",
    "arrow_config": "chooses among adapters for each token (Arrow)",
    "kasa_config": "truncates the base (KaSA)",
    "monteclora_config": "is sampled (MonteCLoRA)",
}
"""Settings that change what the adapter computes in ways that one matrix can't express, or that we don't know."""
_KNOWN = frozenset(
    ["task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
     "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias",
     "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
     "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
     "lora_ga_config", "use_dora", "velora_config", "qalora_group_size", "ensure_weight_tying", "runtime_config",
     "enable_lora", "merge_weights", "encoder_hidden_size", "unsloth_fixed", *_NOT_BAKED]
)  # fmt: skip
_GROUP_REPEATED = re.compile(r"\)[*+{?]")
_MOST_PATTERNS = 4096
_LARGEST = 3e38
_FOUR_BIT = re.compile(r"4-?bit", re.IGNORECASE)
_OTHER_BITS = re.compile(r"gptq|awq|hqq|aqlm|exl2|mlx|gguf|auto-?round", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What of an adapter's settings decides its product. ``base`` is the model it was trained on, as it says.

    ``ties_embeddings``: input embeddings and head share one adapter. ``unknown`` are settings that nobody here knows.
    """

    rank: int
    alpha: float
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    is_rank_stabilised: bool
    has_magnitude: bool
    is_transposed: bool
    saves: tuple[str, ...]
    base: str
    ties_embeddings: bool
    unknown: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank that the settings give ``module``."""
        rank: int = _first(self.rank_pattern, module, self.rank)
        return rank

    def scale_of(self, module: str) -> float:
        """The factor on the product of ``module``: alpha / rank, or alpha / sqrt(rank) for rank-stabilised adapters.

        Kalajdzievski 2023, "A rank stabilization scaling factor for fine-tuning with LoRA".
        """
        rank = self.rank_of(module)
        alpha: float = _first(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.is_rank_stabilised else alpha / rank


def is_four_bit_name(name: str) -> bool:
    """Whether a model's name says that bitsandbytes quantised it to 4 bits: ``unsloth/llama-3-8b-bnb-4bit``."""
    return _FOUR_BIT.search(name) is not None and not _OTHER_BITS.search(name)


def _first(pattern: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    """The value of the first key that is the end of the module's name, or matches it as a regular expression does."""
    for key, value in pattern:
        if _compiled(key).fullmatch(module):
            return value
    return default


@lru_cache(2 * _MOST_PATTERNS)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})")


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The settings of the adapter in ``folder``.

    ModelNotFoundError if there are none, CheckpointError for what can't be true, and for what can't be baked exactly.
    """
    path = folder / CONFIG
    if not path.is_file():
        what = "no folder" if not folder.is_dir() else f"no {CONFIG} in"
        raise ModelNotFoundError(f"{what} '{folder}'; after the + stands the folder or hub name of a LoRA adapter")
    record = read_json(path)
    kind = record.get("peft_type")
    if str(kind).upper() != "LORA":
        raise CheckpointError(f"{path}: this adapter is of the kind {kind!r:.40}; only LoRA can be baked into a model")
    for key, what in _NOT_BAKED.items():
        if record.get(key):
            raise CheckpointError(f"{path}: this adapter {what} ('{key}'), which can't be baked")
    unknown = [key for key, value in record.items() if key not in _KNOWN and value]
    variant = next((key for key in unknown if key.startswith("use_")), None)
    if variant:
        raise CheckpointError(f"{path}: {variant!r:.80} asks for a variant of LoRA unknown here; update mergekit")
    _check_initialisation(path, record.get("init_lora_weights"))
    ranks, alphas = _pattern(path, record, "rank_pattern"), _pattern(path, record, "alpha_pattern")
    return AdapterConfig(
        rank=_rank(path, "r", record.get("r")),
        alpha=_alpha(path, "lora_alpha", record.get("lora_alpha")),
        rank_pattern=tuple((k, _rank(path, f"rank_pattern: {k}", v)) for k, v in ranks.items()),
        alpha_pattern=tuple((k, _alpha(path, f"alpha_pattern: {k}", v)) for k, v in alphas.items()),
        is_rank_stabilised=_switch(path, record, "use_rslora"),
        has_magnitude=_switch(path, record, "use_dora"),
        is_transposed=_switch(path, record, "fan_in_fan_out"),
        saves=_names(path, record.get("modules_to_save")),
        base=str(record.get("base_model_name_or_path") or "")[:500],
        ties_embeddings=_switch(path, record, "ensure_weight_tying"),
        unknown=tuple(sorted(key[:80] for key in unknown)),
    )


def _fault(path: Path, key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {key!r:.100} is {value!r:.60}, expected {wanted}; mend it, or download the adapter again"
    )


def _check_initialisation(path: Path, value: object) -> None:
    """Refuse adapters that were trained on a changed base: without that base their product means nothing."""
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in _KEEP_BASE):
        return
    name = str(value).lower()
    if name.startswith(_CHANGE_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights {value!r:.40} changed the base model before training, so this adapter can't "
            f"be baked onto the original; let PEFT convert it to a plain one (path_initial_model_for_weight_conversion)"
        )
    raise CheckpointError(f"{path}: init_lora_weights {value!r:.40} is unknown, and may have changed the base model")


def _rank(path: Path, key: str, value: object) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise _fault(path, key, value, "a whole number from 1")
    return value


def _alpha(path: Path, key: str, value: object) -> float:
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not abs(number) <= _LARGEST:
        raise _fault(path, key, value, "a finite number")
    return number


def _switch(path: Path, record: Mapping[str, Any], key: str) -> bool:
    value = record.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _fault(path, key, value, "true or false")


def _names(path: Path, value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _fault(path, "modules_to_save", value, "a list of names")
    return tuple(names)


def _pattern(path: Path, record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The entries of a mapping from names, or regular expressions that can't run away, to values."""
    value = record.get(key) or {}
    if not isinstance(value, dict):
        raise _fault(path, key, value, "a mapping from names of modules")
    if len(value) > _MOST_PATTERNS:
        raise CheckpointError(f"{path}: '{key}' has {len(value):,} entries, more than a model has modules")
    for name in value:
        try:
            is_sound = len(name) <= 500 and not _GROUP_REPEATED.search(name) and sum(map(name.count, "*+{?")) <= 3
            if is_sound:
                re.compile(name)  # by itself, too: it may not close our bracket
                _compiled(name)
        except (re.error, RecursionError, OverflowError):
            is_sound = False
        if not is_sound:
            raise CheckpointError(f"{path}: '{key}' has the key {name!r:.80}, which is no name or simple pattern")
    return value
