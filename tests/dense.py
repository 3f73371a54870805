"""Tiny random dense models with configs in the keys of transformers 4, made and loaded by any release of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "initializer_range": 0.1,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
PHI3: dict[str, Any] = {
    **COMMON,
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "original_max_position_embeddings": 128,
    "sliding_window": None,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}


def longrope(pairs: int) -> dict[str, Any]:
    """Scaling with other factors for short and long texts; ``pairs`` is half the number of rotated dimensions."""
    short, long = [1.0 + 0.05 * i for i in range(pairs)], [1.5 + 0.5 * i for i in range(pairs)]
    return {"type": "longrope", "short_factor": short, "long_factor": long}


GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}
MEMBERS: dict[str, dict[str, Any]] = {
    "mini-4k": {**PHI3, "sliding_window": 20},
    "mini-128k": {
        **PHI3,
        "rope_scaling": longrope(8),
        "original_max_position_embeddings": 32,
        "sliding_window": 262144,
    },
    "medium": {**PHI3, **GROUPED},
    "phi-4": {**PHI3, **GROUPED, "rope_theta": 250000.0},
    "phi-4-mini": {
        **PHI3,
        **GROUPED,
        "partial_rotary_factor": 0.75,
        "rope_scaling": longrope(6),
        "original_max_position_embeddings": 32,
        "tie_word_embeddings": True,
        "sliding_window": 262144,
    },
    "partial, unscaled": {**PHI3, "partial_rotary_factor": 0.5},
}
"""Analogues of the members of the Phi-3 family."""

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama, wide heads": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 24,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA3,
    },
    "mistral": {
        **COMMON,
        **GROUPED,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 20,
    },
}


def save_dense(folder: Path, config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of ``config``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": str(dtype).removeprefix("torch.")}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
        tensors = dict(model.named_parameters())
        for tensor in tensors.values():
            tensor.data.add_(0.03 * torch.randn_like(tensor))
    save_file({name: tensor.data.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def load(folder: Path, **settings: Any) -> Any:
    """The model in ``folder`` in float32; AssertionError unless every tensor is found and fits."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True, **settings
    )
    faults = {key: value for key, value in info.items() if value}
    assert not faults, f"{folder} does not load cleanly: {faults}"
    return model.eval()


@torch.no_grad()
def logits(model: Any, length: int) -> torch.Tensor:
    """The logits for a fixed text of ``length`` tokens."""
    tokens = (torch.arange(length) * 31 % 89 + 3).reshape(1, length)
    return model(tokens).logits
