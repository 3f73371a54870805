"""Tiny random Llama checkpoints: a base and fine-tunes of it that differ in how they change it.

``dense`` changes every element; ``grid`` by few step sizes, many of them zero (equal magnitudes, exact zeros);
``small`` and ``tiny`` by very little, and some tensors not at all; ``tied`` is ``dense`` without a head of its own;
``wide`` has more rows in its embeddings. Folders ``*-bf16`` hold the same in bfloat16.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, FFN, VOCAB, HEADS, KV_HEADS = 4, 16, 24, 41, 2, 1
FINE_TUNES = ("dense", "grid", "small", "tiny")
MODELS = ("base", *FINE_TUNES, "tied", "wide")
Tensors = dict[str, np.ndarray]


def shapes(vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor."""
    head = HIDDEN // HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for layer in range(LAYERS):
        found |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (KV_HEADS * head, HIDDEN),
                "self_attn.v_proj": (KV_HEADS * head, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HIDDEN),
                "post_attention_layernorm": (HIDDEN,),
                "mlp.gate_proj": (FFN, HIDDEN),
                "mlp.up_proj": (FFN, HIDDEN),
                "mlp.down_proj": (HIDDEN, FFN),
            }.items()
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocab, HIDDEN)}


def make(folder: Path, seed: int) -> None:
    """Write all models into ``folder``, in float32 and in bfloat16."""
    random = np.random.default_rng(seed)
    # Multiples of 2^-12: a step of the grid added to them is exact, so equal magnitudes stay equal.
    base = {
        name: (np.round((random.standard_normal(shape) * 0.5 + (len(shape) == 1)) * 4096) / 4096).astype(np.float32)
        for name, shape in shapes().items()
    }
    models: dict[str, Tensors] = {"base": base}
    models["dense"] = {n: x + np.float32(0.02) * random.standard_normal(x.shape, np.float32) for n, x in base.items()}
    models["grid"] = {
        n: x + (random.integers(-6, 7, x.shape) * (random.random(x.shape) < 0.6) / 512).astype(np.float32)
        for n, x in base.items()
    }
    for model, step in (("small", 5e-4), ("tiny", 2e-4)):
        models[model] = {
            n: x if "norm" in n or ".2." in n else x + np.float32(step) * random.standard_normal(x.shape, np.float32)
            for n, x in base.items()
        }
    models["tied"] = {n: x for n, x in models["dense"].items() if n != "lm_head.weight"}
    models["wide"] = dict(models["dense"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = random.standard_normal((7, HIDDEN), np.float32)
        models["wide"][name] = np.concatenate([models["dense"][name], extra])
    for name, tensors in models.items():
        _save(folder / name, tensors, torch.float32)
        _save(folder / f"{name}-bf16", tensors, torch.bfloat16)


def _save(folder: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 64,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    stored = {name: torch.from_numpy(x).to(dtype) for name, x in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
