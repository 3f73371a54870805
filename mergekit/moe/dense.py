"""A dense model as a mixture needs to know it: sizes, rotary settings, and what of it no mixture can express."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.errors import IncompatibleError
from mergekit.families.fused import Heads
from mergekit.families.layout import is_derived_buffer
from mergekit.families.rope import Rope, read_rope
from mergekit.planning.models import Model

__all__ = ["Dense", "check_tensors", "is_mlp", "read_dense"]

_SWITCHES = {"attention_bias": "biases in attention", "mlp_bias": "biases in the MLP"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8,
                "sliding_window": 4096},
    "phi3": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
}  # fmt: skip
"""What transformers takes where a config of the family is silent, and a Mixtral would take something else."""
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
        return window if self.model_type != "llama" and window is not None and window < self.positions else None


def is_mlp(name: str) -> bool:
    """Whether a tensor of a dense model is a part of an expert."""
    return ".mlp." in name


def read_dense(model: Model, accepts: tuple[str, ...], target: str) -> Dense:
    """The facts of ``model``; IncompatibleError names the property for which ``target`` can't express it exactly."""
    kind = str(model.config.get("model_type"))
    config, short = {**_DEFAULTS.get(kind, {}), **model.config}, model.reference.short
    if kind not in accepts:
        why = f", which has {_OTHERS[kind]}" if kind in _OTHERS else ""
        raise IncompatibleError(
            f"{model.reference} is a '{kind}' model{why}: no exact {target} exists for it. "
            f"Experts and base must be {' or '.join(accepts)} models"
        )
    for key, what in _SWITCHES.items():
        if config.get(key):
            raise IncompatibleError(f"{model.reference} has {what} ({key}), for which {target} has no place")
    layers, hidden, query = (
        _size(model, config, k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    key_value = query if config.get("num_key_value_heads") is None else _size(model, config, "num_key_value_heads")
    head = hidden // query if config.get("head_dim") is None else _size(model, config, "head_dim")
    positions = _size(model, config, "max_position_embeddings")
    if config.get("sliding_window") is not None:
        _size(model, config, "sliding_window")
    rope = _rope(model, config, head)
    if kind == "phi3" and rope.kind not in ("default", "longrope"):
        raise IncompatibleError(f"{model.reference} has '{rope.kind}' rotary scaling, which Phi-3 models don't have")
    if kind == "phi3" and target == "Phi-3 MoE" and rope.scaling.get("attention_factor") is not None:
        raise IncompatibleError(
            f"{model.reference} sets 'attention_factor', which a {target} can't hold; use architecture: mixtral"
        )
    if rope.partial < 1 and (rope.kind not in ("default", "longrope") or rope.scaling.get("factor") is not None):
        raise IncompatibleError(
            f"{model.reference} rotates a part of each head with '{rope.kind}' scaling; only longrope without a "
            f"'factor' can be rewritten"
        )
    return Dense(short, kind, config, layers, hidden, Heads(query, key_value, head), rope, positions)


def _rope(model: Model, config: Mapping[str, Any], head: int) -> Rope:
    """The rotary settings, their numbers checked."""
    fault = IncompatibleError(
        f"{model.reference}: config.json has no usable rotary settings (rope_theta, rope_scaling)"
    )
    try:
        rope = read_rope(config)
    except (TypeError, ValueError, OverflowError):
        raise fault from None
    if not (0 < rope.partial <= 1 and 0 < rope.theta < math.inf):
        raise fault
    if rope.kind == "longrope":
        if not isinstance(rope.original, int) or isinstance(rope.original, bool) or rope.original < 2:
            raise fault
        for key in ("short_factor", "long_factor"):
            factors = rope.scaling.get(key)
            if not isinstance(factors, list) or len(factors) != int(head * rope.partial) // 2:
                raise fault
            if not all(isinstance(f, int | float) and not isinstance(f, bool) and 0 < f < math.inf for f in factors):
                raise fault
    return rope


def check_tensors(dense: Dense, model: Model) -> None:
    """Refuse a base whose tensors are not exactly those that its config describes."""
    stack = model.layout.stacks.get("model.layers.")
    if stack is None or stack.count != dense.layers:
        found = "none that are numbered so" if stack is None else f"{stack.count} layers"
        raise IncompatibleError(
            f"{model.reference}: config.json says {dense.layers} layers, but the files hold {found}; "
            f"'model.layers.0' to 'model.layers.{dense.layers - 1}' are wanted"
        )
    wanted = dict(_expected(model, dense))
    for name, shape in wanted.items():
        info = model.tensors.get(name)
        if info is None or info.shape != shape or not (info.dtype.is_float or info.dtype.kind == "fp8"):
            has = "there is no such tensor" if info is None else f"it is {info}"
            raise IncompatibleError(f"{model.reference}: {name} has to be {list(shape)} by its config.json, but {has}")
    for name, info in model.tensors.items():
        if name not in wanted and name != "lm_head.weight" and not is_derived_buffer(name, info.shape):
            raise IncompatibleError(f"{model.reference}: a mixture has no place for tensor {name} {list(info.shape)}")


def _expected(model: Model, dense: Dense) -> Iterator[tuple[str, tuple[int, ...]]]:
    config, hidden = dense.config, dense.hidden
    vocabulary, ffn = (_size(model, config, key) for key in ("vocab_size", "intermediate_size"))
    query, key_value = dense.heads.query * dense.heads.size, dense.heads.key_value * dense.heads.size
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (vocabulary, hidden)
    modules: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.o_proj": (hidden, query),
        "mlp.down_proj": (hidden, ffn),
    }
    if dense.model_type == "phi3":
        modules |= {"self_attn.qkv_proj": (query + 2 * key_value, hidden), "mlp.gate_up_proj": (2 * ffn, hidden)}
    else:
        modules |= {f"self_attn.{p}_proj": (n, hidden) for p, n in (("q", query), ("k", key_value), ("v", key_value))}
        modules |= {f"mlp.{p}_proj": (ffn, hidden) for p in ("gate", "up")}
    for layer in range(dense.layers):
        for module, shape in modules.items():
            yield f"model.layers.{layer}.{module}.weight", shape


def _size(model: Model, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise IncompatibleError(f"{model.reference}: config.json has no usable '{key}' (found {value!r:.40})")
    return value
