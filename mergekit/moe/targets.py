"""The families that a mixture can be written as: one record each, of names and of a config.

To add a family, add a record: which dense models it can express, where its router and experts go, whether fused
matrices are split, and the function that writes its config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.errors import UsageError
from mergekit.families.rope import full_rotary
from mergekit.moe.dense import Dense

__all__ = ["MIXTRAL", "PHI3MOE", "Counts", "Target", "find_target"]


@dataclass(frozen=True, slots=True)
class Counts:
    """How many experts there are, and how many a token goes through."""

    experts: int
    per_token: int


@dataclass(frozen=True, slots=True)
class Target:
    """One output family. ``{layer}`` stands in ``router``, ``{expert}`` in the names of ``experts``.

    ``experts`` maps modules of a dense layer to modules of the output's; ``splits``: fused matrices are taken apart.
    ``config`` makes the entries of config.json; ``code`` are files that come along; ``notices`` say where it runs.
    """

    name: str
    title: str
    accepts: tuple[str, ...]
    router: str
    experts: Mapping[str, str]
    splits: bool
    config: Callable[[Dense, Counts], dict[str, Any]]
    notices: Callable[[Dense, Counts], list[str]]
    code: tuple[Path, ...] = ()


_COMMON = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
           "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "attention_dropout",
           "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
"""Keys that dense models and Mixtral share, with the same meaning."""


def _entries(dense: Dense, counts: Counts) -> dict[str, Any]:
    """What every target's config.json says in the same words."""
    return {
        **{key: dense.config[key] for key in _COMMON if key in dense.config},
        "num_key_value_heads": dense.heads.key_value,
        "sliding_window": dense.window,
        "rope_theta": dense.rope.theta,
        "rope_scaling": None,
        "num_local_experts": counts.experts,
        "num_experts_per_tok": counts.per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def _mixtral_config(dense: Dense, counts: Counts) -> dict[str, Any]:
    """Keys of transformers 4, which version 5 reads too; the other way round rotary settings are lost silently."""
    config: dict[str, Any] = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    config |= {**_entries(dense, counts), "head_dim": dense.heads.size, "router_jitter_noise": 0.0}
    scaling, kind, original = dict(dense.rope.scaling), dense.rope.kind, dense.rope.original
    if dense.rope.partial < 1:
        full = full_rotary(dense.rope, dense.heads.size, dense.positions)
        kind, original = "longrope", original or dense.positions
        scaling |= {"short_factor": list(full.short_factor), "long_factor": list(full.long_factor)}
    if kind != "default":
        config["rope_scaling"] = {"type": kind, "rope_type": kind, **scaling}
    if kind != "default" and original is not None:
        # Inside for vLLM, outside for transformers; but a scaling with a factor of its own must not get a second one.
        config["rope_scaling"]["original_max_position_embeddings"] = original
        if kind == "longrope" and "factor" not in scaling:
            config["original_max_position_embeddings"] = original
    return config


def _training_notices(counts: Counts) -> list[str]:
    if counts.per_token > 1 or counts.experts == 1:
        return []
    return ["with one expert per token its weight is always 1, so in training only the load-balancing loss reaches the "
            "routers; set 'experts_per_token: 2' to train them"]  # fmt: skip


def _mixtral_notices(dense: Dense, counts: Counts) -> list[str]:
    notices = _training_notices(counts)
    if counts.experts & (counts.experts - 1):
        notices.append(f"{counts.experts} experts: some releases of llama.cpp want 2, 4, 8, ... of them")
    if dense.rope.kind == "longrope" or dense.rope.partial < 1:
        notices.append(
            f"beyond {dense.rope.original or dense.positions} tokens the result needs transformers 4.49 or newer (4.48 "
            f"keeps the short rotary factors), and text generated across that length differs from the dense model's: "
            f"Mixtral keeps the keys it has cached; 'architecture: phi3moe' does as the dense model does"
        )
        notices.append(
            "llama.cpp reads a Mixtral without its longrope factors: its results would be wrong for this model; vLLM "
            "takes the long factors for all texts once its max_model_len exceeds the original context"
        )
    if dense.rope.partial < 1:
        notices.append(
            "a partial rotary embedding is rewritten as a full one: exact in float32; in 16 bits some rows of queries "
            "and keys are rounded once more (phi3moe leaves them as they are)"
        )
    elif dense.rope.kind != "longrope" and dense.window is not None:
        notices.append(
            f"llama.cpp reads a Mixtral without its sliding window: right up to {dense.window} tokens of context"
        )
    return notices


_PHI3_ONLY = ("head_dim", "resid_pdrop", "embd_pdrop", "original_max_position_embeddings", "partial_rotary_factor")
_CODE = Path(__file__).parent / "phi3moe"


def _phi3moe_config(dense: Dense, counts: Counts) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["Phi3MoEForCausalLM"],
        "model_type": "phi3moe",
        "auto_map": {
            "AutoConfig": "configuration_phi3_moe.Phi3MoEConfig",
            "AutoModel": "modeling_phi3_moe.Phi3MoEModel",
            "AutoModelForCausalLM": "modeling_phi3_moe.Phi3MoEForCausalLM",
        },
    }
    config |= {key: dense.config[key] for key in _PHI3_ONLY if key in dense.config}
    config |= _entries(dense, counts)
    if dense.rope.partial < 1:
        config["partial_rotary_factor"] = dense.rope.partial
    if dense.rope.kind == "longrope":
        # Phi-3 in transformers 4 accepts these three keys and no other.
        factors = {key: list(dense.rope.scaling[key]) for key in ("short_factor", "long_factor")}
        config["rope_scaling"] = {"type": "longrope", **factors}
        config["original_max_position_embeddings"] = dense.rope.original
    return config


def _phi3moe_notices(dense: Dense, counts: Counts) -> list[str]:
    notices = [
        *_training_notices(counts),
        "the result loads with trust_remote_code=True: its two Python files lie beside the weights",
    ]
    if dense.rope.partial < 1:
        notices.append("a partial rotary embedding needs transformers 4.49 or newer")
    return notices


MIXTRAL = Target(
    "mixtral",
    "Mixtral",
    ("phi3", "llama", "mistral"),
    "model.layers.{layer}.block_sparse_moe.gate.weight",
    {
        "mlp.gate_proj": "block_sparse_moe.experts.{expert}.w1",
        "mlp.down_proj": "block_sparse_moe.experts.{expert}.w2",
        "mlp.up_proj": "block_sparse_moe.experts.{expert}.w3",
    },
    True,
    _mixtral_config,
    _mixtral_notices,
)
PHI3MOE = Target(
    "phi3moe",
    "Phi-3 MoE",
    ("phi3",),
    "model.layers.{layer}.mlp.gate.weight",
    {
        "mlp.gate_up_proj": "mlp.experts.{expert}.gate_up_proj",
        "mlp.down_proj": "mlp.experts.{expert}.down_proj",
    },
    False,
    _phi3moe_config,
    _phi3moe_notices,
    (_CODE / "configuration_phi3_moe.py", _CODE / "modeling_phi3_moe.py"),
)
_TARGETS = (MIXTRAL, PHI3MOE)
_LATER = ("deepseek moe", "qwen moe", "qwen3 moe")


def find_target(text: str) -> Target:
    """The family that ``text`` names (any case, or the start of its name or title); UsageError if there is none."""
    wanted = text.strip().lower()
    for target in _TARGETS:
        if wanted and any(name.startswith(wanted) for name in (target.name, target.title.lower())):
            return target
    if wanted and any(name.startswith(wanted) for name in _LATER):
        raise UsageError(f"'{text}' is not built yet; Valid: {', '.join(t.name for t in _TARGETS)}.")
    raise UsageError(f"no architecture '{text}'. Valid: {', '.join(t.name for t in _TARGETS)}.")
