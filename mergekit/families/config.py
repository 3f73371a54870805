"""Facts in a model's config.json that a merge reads or must keep true: layers, vocabulary, tying, dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit.dtypes import DType

__all__ = [
    "LAYER_KEYS",
    "auto_class",
    "has_no_head",
    "ids_beyond",
    "is_encoder_decoder",
    "is_tied",
    "language_section",
    "layer_count",
    "loading",
    "needs_code",
    "set_dtype",
    "set_tied",
    "set_vocabulary",
    "vocab_size",
]

LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "decoder_layers")
"""Under which keys configs give the number of layers."""
_SECTIONS = ("text_config", "language_config", "llm_config", "decoder")


def language_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: the config itself, or a section of it."""
    if any(isinstance(config.get(key), int) for key in LAYER_KEYS):
        return config
    for name in _SECTIONS:
        section = config.get(name)
        if isinstance(section, Mapping):
            return section
    return config


def layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers that a config gives, or None."""
    section = language_section(config)
    for key in LAYER_KEYS:
        value = section.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """The vocabulary size that a config gives, or None."""
    for section in (language_section(config), config):
        value = section.get("vocab_size")
        if isinstance(value, int):
            return value
    return None


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the config ties the head to the embeddings; None where it does not say."""
    for section in (config, language_section(config)):
        value = section.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
    return None


def has_no_head(config: Mapping[str, Any]) -> bool:
    """Whether the architecture is a bare model (``BertModel``, ``GPT2Model``), which a head does not belong to."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return name.endswith("Model") and not name.endswith("HeadModel")


def auto_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads a model by its config: by what its architecture is called.

    >>> auto_class({"architectures": ["Phi3ForCausalLM"]})
    'AutoModelForCausalLM'
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if name.endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    if name.endswith("ForConditionalGeneration"):
        kinds = {"ImageTextToText": "vision_config" in config, "SpeechSeq2Seq": "num_mel_bins" in config,
                 "Seq2SeqLM": is_encoder_decoder(config)}  # fmt: skip
        return next((f"AutoModelFor{kind}" for kind, fits in kinds.items() if fits), "AutoModel")
    heads = ("ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForImageTextToText")
    return next((f"AutoModel{head}" for head in heads if name.endswith(head)), "AutoModel")


def needs_code(config: Mapping[str, Any]) -> bool:
    """Whether a model can only be loaded by running the Python code that comes with it, or that its config names."""
    return "auto_map" in config


def loading(config: Mapping[str, Any], name: str) -> str:
    """The call of transformers that loads a model by its config; ``name`` is Python for its folder.

    >>> loading({"architectures": ["GPT2LMHeadModel"]}, '"out"')
    'AutoModelForCausalLM.from_pretrained("out")'
    """
    return f"{auto_class(config)}.from_pretrained({name}{', trust_remote_code=True' if needs_code(config) else ''})"


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Whether the model has an encoder and a decoder, so that "layer 3" could be in either."""
    return bool(language_section(config).get("is_encoder_decoder") or config.get("is_encoder_decoder"))


def set_tied(config: dict[str, Any], tied: bool) -> None:
    """Record whether the head is tied, where the config says it now (the top level, and the section if it does)."""
    config["tie_word_embeddings"] = tied
    section = language_section(config)
    if isinstance(section, dict) and section is not config and "tie_word_embeddings" in section:
        section["tie_word_embeddings"] = tied


def set_vocabulary(config: dict[str, Any], rows: int) -> None:
    """Record the number of embedding rows."""
    section = language_section(config)
    target = section if isinstance(section, dict) and "vocab_size" in section else config
    target["vocab_size"] = rows


def ids_beyond(config: dict[str, Any], rows: int) -> list[tuple[dict[str, Any], str]]:
    """The settings (section, key) that name a token whose id is ``rows`` or more."""
    section = language_section(config)
    sections = [config] if section is config or not isinstance(section, dict) else [config, section]
    found = []
    for part in sections:
        for key, value in part.items():
            ids = value if isinstance(value, list) else [value]
            if key.endswith("_token_id") and any(isinstance(i, int) and i >= rows for i in ids):
                found.append((part, key))
    return found


def set_dtype(config: dict[str, Any], dtype: DType) -> None:
    """Record the dtype under whichever key the config uses (``torch_dtype`` for the widest reach, else ``dtype``)."""
    sections = [config, *(s for s in config.values() if isinstance(s, dict))]
    for section in sections:
        for key in ("torch_dtype", "dtype"):
            if key in section:
                section[key] = dtype.name
    if not {"torch_dtype", "dtype"} & set(config):
        config["torch_dtype"] = dtype.name
