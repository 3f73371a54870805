"""A dense model as a mixture needs to know it: sizes, rotary settings, and what of it no mixture can express."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.errors import IncompatibleError
from mergekit.families.fused import Heads
from mergekit.families.rope import Rope, read_rope
from mergekit.planning.models import Model

__all__ = ["Dense", "is_mlp", "read_dense"]

_SWITCHES = {"attention_bias": "biases in attention", "mlp_bias": "biases in the MLP"}
_OTHERS = {
    "phi3small": "block-sparse attention, a gated GELU and rescaled weights",
    "phi4flash": "state-space layers and memory shared between layers",
    "phi3_v": "an image encoder",
    "phi4mm": "encoders of images and sound, and adapters switched by them",
    "phi": "parallel attention and MLP, layer norm with biases",
    "phimoe": "experts already",
    "mixtral": "experts already",
    "qwen2": "biases on query, key and value",
    "qwen3": "norms on query and key",
    "gemma": "norms with an offset and scaled embeddings",
    "gemma2": "norms with an offset, and four of them in each layer",
    "gemma3_text": "norms with an offset, and four of them in each layer",
}
"""Model types that are asked for, and the property that forbids them."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """The facts of a dense model's config that decide what a mixture of it looks like."""

    name: str
    model_type: str
    config: Mapping[str, Any]
    layers: int
    hidden: int
    heads: Heads
    rope: Rope
    positions: int

    @property
    def window(self) -> int | None:
        """The sliding window, None where it is absent or never reached."""
        window = self.config.get("sliding_window")
        if self.model_type == "llama" or not isinstance(window, int) or self.config.get("use_sliding_window") is False:
            return None
        return window if window < self.positions else None


def is_mlp(name: str) -> bool:
    """Whether a tensor of a dense model is a part of an expert."""
    return ".mlp." in name


def read_dense(model: Model, accepts: tuple[str, ...], target: str) -> Dense:
    """The facts of ``model``; IncompatibleError names the property for which ``target`` can't express it exactly."""
    config, short = model.config, model.reference.short
    kind = str(config.get("model_type"))
    if kind not in accepts:
        why = f", which has {_OTHERS[kind]}" if kind in _OTHERS else ""
        raise IncompatibleError(
            f"{model.reference} is a '{kind}' model{why}: no exact {target} exists for it. "
            f"Experts and base must be {' or '.join(accepts)} models"
        )
    for key, what in _SWITCHES.items():
        if config.get(key):
            raise IncompatibleError(f"{model.reference} has {what} ({key}), for which {target} has no place")
    layers, hidden = _size(model, "num_hidden_layers"), _size(model, "hidden_size")
    query = _size(model, "num_attention_heads")
    key_value = config.get("num_key_value_heads") or query
    heads = Heads(query, int(key_value), int(config.get("head_dim") or hidden // query))
    rope = read_rope(config)
    if kind == "phi3" and rope.kind not in ("default", "longrope"):
        raise IncompatibleError(f"{model.reference} has '{rope.kind}' rotary scaling, which Phi-3 models don't have")
    if kind == "phi3" and target == "Phi-3 MoE" and rope.scaling.get("attention_factor") is not None:
        raise IncompatibleError(
            f"{model.reference} sets 'attention_factor', which a {target} can't hold; use architecture: mixtral"
        )
    if rope.partial < 1 and rope.kind not in ("default", "longrope"):
        raise IncompatibleError(
            f"{model.reference} rotates a part of each head with '{rope.kind}' scaling; only longrope can be rewritten"
        )
    return Dense(short, kind, config, layers, hidden, heads, rope, _size(model, "max_position_embeddings"))


def _size(model: Model, key: str) -> int:
    value = model.config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise IncompatibleError(f"{model.reference}: config.json has no usable '{key}' (found {value!r:.40})")
    return value
